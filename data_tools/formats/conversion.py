"""Converting tokens of any format to a new folder, or adding a manifest to llm.c's shards in place."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

from data_tools.arrays import TokenArray
from data_tools.errors import DataError, one_line_read_errors, one_line_write_errors
from data_tools.formats.collection import TokenCollection
from data_tools.formats.flat_files import LLMC, NANOGPT, map_llmc_file
from data_tools.formats.opening import open_collection
from data_tools.formats.plan import DEFAULT_SHARD_TOKENS, ConvertRequest, PlannedFile, chunks, keeps_shards, plan_files
from data_tools.shards.contents import Contents, Vocabulary
from data_tools.shards.manifest import MANIFEST_NAME, Manifest, ShardRecord, SourceRecord, mask_file_of
from data_tools.shards.verification import verify
from data_tools.shards.writer import FlatFile, ShardWriter
from data_tools.storage.atomic import atomic_folder, write_json_durably
from data_tools.storage.files import sha256_of_file
from data_tools.threads import Advance, map_threads, no_progress


@dataclass(frozen=True)
class Conversion:
    """The result of a conversion: the format that was read, and a record of each file that was written."""

    source_format: str
    files: tuple[ShardRecord, ...]


def convert(request: ConvertRequest, written: Advance = no_progress, verified: Advance = no_progress) -> Conversion:
    """Convert tokens to a new folder, which appears complete or not at all.

    Tokens and their order do not change, except for the separators of Megatron's files (see ``MegatronTokens``). A
    source folder in our format is verified first. All formats but nanoGPT's get a manifest.

    ``written`` is called with the bytes of tokens that were written, ``verified`` with those of the source that were
    verified.

    Raises:
        DataError: an input is damaged, the requested format would lose something, or the folder cannot be written.
    """
    _require_new(request.out)
    collection = open_collection(request.source, request.source_format, request.split_of)
    vocabulary = Vocabulary(collection.tokenizer)
    planned = plan_files(request, collection, knows_bytes=vocabulary.knows_bytes)
    if collection.manifest:
        verify(collection.path, request.workers, verified)
        _require_new(request.out)  # again, because verifying can take long
    with one_line_write_errors(request.out), atomic_folder(request.out) as folder:
        writer = _FileWriter(folder, collection, vocabulary, raw=request.to == NANOGPT)
        files = tuple(map_threads(writer.write, planned, request.workers, written))
        if request.to != NANOGPT:
            _write_manifest(folder, _manifest_of(request, collection, files))
    return Conversion(collection.format, files)


def adopt_in_place(
    folder: Path, split_of: Mapping[str, str] | None = None, workers: int | None = None, advance: Advance = no_progress
) -> Manifest:
    """Write a manifest beside llm.c's shards, which makes their folder a data set; the shards are not changed.

    Args:
        split_of: splits of files by name, for names that do not tell.
        workers: number of threads; None means one per core.
        advance: called with the bytes of files that were read.

    Raises:
        DataError: the folder has a manifest, has no such shards or a damaged one, or cannot be written.
    """
    if (folder / MANIFEST_NAME).exists():
        raise DataError(f"{folder} already has a {MANIFEST_NAME}; nothing is left to do")
    if not folder.is_dir():
        raise DataError(f"--in-place: {folder} is not a folder")
    collection = open_collection(folder, split_of=split_of)
    if collection.format != LLMC:
        raise DataError(
            f"--in-place: the files of {folder} are in the format {collection.format}; only llm.c's can stay in place"
        )
    files = [(split, file.path) for split, members in collection.splits.items() for file in members.files]
    describe = partial(_describe_llmc_shard, Vocabulary(collection.tokenizer))
    shards = tuple(map_threads(describe, files, workers, advance))
    # The folder may be moved, so its path says nothing about the origin of the tokens.
    options = {key: value for key, value in collection.source.options.items() if key != "input"}
    source = SourceRecord(LLMC, options)
    manifest = Manifest(collection.tokenizer, source, {"format": LLMC}, shards, made=_conversion_record(LLMC))
    _write_manifest(folder, manifest)
    return manifest


def _require_new(out: Path) -> None:
    """Raise DataError unless a folder does not exist yet or is empty."""
    if out.exists() and not out.is_dir():
        raise DataError(f"--out {out} is a file; name a folder")
    if os.path.ismount(out):
        raise DataError(f"--out {out} is a mount point; name a new folder in it")
    with one_line_write_errors(out):
        names = sorted(path.name for path in out.iterdir()) if out.exists() else []
    if names:
        raise DataError(f"--out {out} is not empty (it holds {names[0]}); name a new or empty folder")


class _FileWriter:
    """Writes planned files into a folder; safe to call from several threads."""

    def __init__(self, folder: Path, collection: TokenCollection, vocabulary: Vocabulary, *, raw: bool) -> None:
        self._folder = folder
        self._collection = collection
        self._vocabulary = vocabulary
        self._open_format = partial(FlatFile, header=lambda tokens: b"") if raw else None  # nanoGPT's has no header

    def write(self, planned: PlannedFile, advance: Advance) -> ShardRecord:
        """Write one file in constant memory. Raises DataError if a token is outside the vocabulary."""
        writer = ShardWriter(self._folder, planned.name, planned.split, self._open_format)
        try:
            for tokens, contents in self._read(planned, advance):
                writer.append(tokens, documents=contents.documents, utf8_bytes=contents.utf8_bytes)
            record = writer.close()
        except BaseException:
            writer.abort()
            raise
        return self._keep_record(planned.record, record) if planned.record else record

    def _read(self, planned: PlannedFile, advance: Advance) -> Iterator[tuple[TokenArray, Contents]]:
        stream = self._collection.splits[planned.split].stream
        for start, length in chunks(planned.start, planned.stop):
            tokens = stream.read(start, length)
            yield tokens, self._vocabulary.count(tokens, self._collection.path)
            advance(tokens.nbytes)

    def _keep_record(self, original: ShardRecord, record: ShardRecord) -> ShardRecord:
        """Return the new record with the counts of the original shard, and copy its mask."""
        # Bytes of text can be counted again only for GPT-2's ids.
        record = replace(record, documents=original.documents, utf8_bytes=original.utf8_bytes)
        if original.mask_file is None:
            return record
        path = self._folder / mask_file_of(record.file)
        with one_line_write_errors(path):
            shutil.copyfile(self._collection.path / original.mask_file, path)
        return replace(record, mask_sha256=original.mask_sha256)


def _manifest_of(request: ConvertRequest, collection: TokenCollection, files: tuple[ShardRecord, ...]) -> Manifest:
    original = collection.manifest
    settings = {**(original.settings if original else {}), "format": request.to}
    if not keeps_shards(request, collection):
        settings["shard_tokens"] = request.shard_tokens or DEFAULT_SHARD_TOKENS
    made = {**(original.made or {} if original else {}), **_conversion_record(collection.format)}
    report = original.report if original else None
    return Manifest(collection.tokenizer, collection.source, settings, files, report, made)


def _write_manifest(folder: Path, manifest: Manifest) -> None:
    path = folder / MANIFEST_NAME
    with one_line_write_errors(path):
        write_json_durably(path, manifest.to_json())


def _conversion_record(format: str) -> dict[str, Any]:
    return {"converted_at": datetime.now(timezone.utc).isoformat(timespec="seconds"), "converted_from": format}


def _describe_llmc_shard(vocabulary: Vocabulary, file: tuple[str, Path], advance: Advance) -> ShardRecord:
    split, path = file
    tokens = map_llmc_file(path)
    with one_line_read_errors(path):
        sha256 = sha256_of_file(path, advance)
    contents = vocabulary.count(tokens, path, advance)
    return ShardRecord(path.name, split, tokens.size, contents.documents, contents.utf8_bytes, sha256)
