"""Writing one file of a conversion."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from data_tools.arrays import TokenArray
from data_tools.errors import one_line_write_errors
from data_tools.formats.collection import TokenCollection
from data_tools.formats.layout import PlannedFile, chunks
from data_tools.shards import ShardRecord, ShardWriter
from data_tools.shards.contents import Contents, Vocabulary
from data_tools.shards.manifest import mask_file_of
from data_tools.storage.atomic import atomic_file, fsync_file
from data_tools.threads import Advance


class FileWriter:
    """Writes planned files into a folder; safe to call from several threads."""

    def __init__(self, folder: Path, collection: TokenCollection, vocabulary: Vocabulary, *, raw: bool) -> None:
        """Prepare.

        Args:
            folder: where the files go.
            collection: where their tokens are.
            vocabulary: of the tokens.
            raw: write bare tokens as nanoGPT does; otherwise the suffix names the format of the shard.
        """
        self._folder = folder
        self._collection = collection
        self._vocabulary = vocabulary
        self._raw = raw

    def write(self, planned: PlannedFile, advance: Advance) -> ShardRecord:
        """Write one file, in constant memory and durably.

        Raises:
            DataError: a token is outside the vocabulary, or the disk refuses.
        """
        if self._raw:
            return self._write_raw(planned, advance)
        record = self._write_shard(planned, advance)
        return self._keep_record(planned.record, record) if planned.record else record

    def _write_raw(self, planned: PlannedFile, advance: Advance) -> ShardRecord:
        path = self._folder / planned.name
        digest = hashlib.sha256()
        total = Contents()
        with one_line_write_errors(path), atomic_file(path) as file:
            for tokens, contents in self._chunks(planned, advance):
                content = tokens.astype("<u2", copy=False).data
                digest.update(content)
                file.write(content)
                total += contents
        return _record(planned, total, digest.hexdigest())

    def _write_shard(self, planned: PlannedFile, advance: Advance) -> ShardRecord:
        writer = ShardWriter(self._folder, planned.name, planned.split)
        try:
            for tokens, contents in self._chunks(planned, advance):
                writer.append(tokens, documents=contents.documents, utf8_bytes=contents.utf8_bytes)
            return writer.close()
        except BaseException:
            writer.abort()
            raise

    def _chunks(self, planned: PlannedFile, advance: Advance) -> Iterator[tuple[TokenArray, Contents]]:
        """Pieces of the tokens with what they amount to."""
        stream = self._collection.splits[planned.split].stream
        for start, length in chunks(planned.start, planned.stop):
            tokens = stream.read(start, length)
            yield tokens, self._vocabulary.count(tokens, self._collection.path)
            advance(tokens.nbytes)

    def _keep_record(self, original: ShardRecord, record: ShardRecord) -> ShardRecord:
        """The new record with what the original says of the same tokens, and its mask."""
        # Its bytes were counted when it was made; for ids that are not GPT-2's they could not be counted again.
        record = replace(record, documents=original.documents, utf8_bytes=original.utf8_bytes)
        if original.mask_file is None:
            return record
        path = self._folder / mask_file_of(record.file)
        with one_line_write_errors(path):
            shutil.copyfile(self._collection.path / original.mask_file, path)
            fsync_file(path)
        return replace(record, mask_sha256=original.mask_sha256)


def _record(planned: PlannedFile, contents: Contents, sha256: str) -> ShardRecord:
    return ShardRecord(
        file=planned.name,
        split=planned.split,
        tokens=planned.stop - planned.start,
        documents=contents.documents,
        utf8_bytes=contents.utf8_bytes,
        sha256=sha256,
    )
