"""Process one chunk: read its documents, choose a split for each document, then encode, check and write them."""

import functools
import io
import random
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from data_tools.corpus.chunks import Chunk, ChunkRecord, SkippedRows, documents_of
from data_tools.corpus.identity import identity_of
from data_tools.corpus.parallel import Unfinished
from data_tools.corpus.request import TokenizeRequest
from data_tools.corpus.split import AssignedDocument, assign_splits
from data_tools.encoding.documents import EncodedDocument, beginning_of, encode_document, fingerprint_of, utf8_of
from data_tools.encoding.encoders import REFERENCE_ENCODER, load_encoder
from data_tools.errors import DataError, one_line_write_errors
from data_tools.shards.contents import Contents
from data_tools.shards.manifest import TRAIN_SPLIT, VAL_SPLIT, ShardRecord
from data_tools.shards.writer import ShardWriter
from data_tools.sources import Source, open_source
from data_tools.storage.folders import open_folder, scratch_of
from data_tools.storage.json_values import sha256_of_json

#: Receives the progress since the last call.
Report = Callable[[Contents], None]

#: The bytes of text between two reports of the progress.
_REPORT_BYTES = 1 << 20
#: On average, one document in 512 is compared with tiktoken.
_CHECK_ONE_IN = 512
#: Of a longer text, only the beginning is compared, because tiktoken needs minutes for hundreds of megabytes.
_CHECKED_CHARACTERS = 1 << 20
_LENGTH_CLASSES = 33


@dataclass(frozen=True)
class Job:
    """The values that are the same for all chunks of a request.

    Attributes:
        encoder: ``gigatoken`` or ``tiktoken``.
        is_one_chunk: whether the whole corpus is one chunk.
        identity_sha256: the hash of the request's identity (see ``identity_of``). A worker that computes another hash
            knows that the source has changed.
    """

    request: TokenizeRequest
    encoder: str
    is_one_chunk: bool
    identity_sha256: str


def encode_chunk(job: Job, chunk: Chunk, report: Report) -> Unfinished[ChunkRecord]:
    """Encode a chunk, and write its shards into a temporary folder.

    The result has a function ``finish``. This function moves the shards into the output folder, then writes and returns
    the chunk's record.

    Raises:
        DataError: ``finish`` found that the encoder and tiktoken return different tokens.
    """
    folder = open_folder(job.request.out)
    check = _ReferenceCheck(job.encoder, chunk)
    with ExitStack() as resources:
        scratch = resources.enter_context(scratch_of(folder))
        writers = {split: _SplitWriter(scratch, split, chunk, job.request) for split in (TRAIN_SPLIT, VAL_SPLIT)}
        record = _write_documents(job, chunk, writers, check, report)
        kept = resources.pop_all()

    def finish() -> ChunkRecord:
        with kept:
            check.compare()
            shards = tuple(shard for writer in writers.values() for shard in writer.close())
            complete = replace(record, shards=shards)
            record_path = scratch / chunk.record_file
            with one_line_write_errors(record_path):
                record_path.parent.mkdir()
                record_path.write_bytes(complete.to_bytes())
            # The record last: a chunk with a record and all its shards is finished.
            folder.take(scratch, [*(name for shard in shards for name in shard.files), chunk.record_file])
        return complete

    return Unfinished(finish)


def _write_documents(
    job: Job, chunk: Chunk, writers: Mapping[str, "_SplitWriter"], check: "_ReferenceCheck", report: Report
) -> ChunkRecord:
    """Encode the documents of a chunk, and append them to the shards of their splits.

    Returns the chunk's record. The record has no shards, because they are not closed yet.
    """
    request = job.request
    encoder = load_encoder(job.encoder)
    repeated = _load_repeated(request, chunk)
    skipped = SkippedRows()
    lengths = [0] * _LENGTH_CLASSES
    is_divided = False
    # The progress since the last report. Adding a Contents per document would take longer.
    new_documents = new_tokens = new_bytes = 0
    documents = assign_splits(
        documents_of(chunk, _open_source(job), request, skipped),
        val_fraction=request.val_fraction,
        seed=request.seed,
        fill_both=job.is_one_chunk,
    )
    for number, assigned in enumerate(documents):
        if number in repeated:
            continue
        encoded = encode_document(encoder, assigned.document)
        check.draw(number, assigned, encoded)
        is_divided |= assigned.is_divided
        tokens, utf8_bytes = encoded.tokens.size, len(assigned.utf8)
        writers[assigned.split].append(encoded, utf8_bytes)
        lengths[tokens.bit_length() - 1] += 1
        new_documents += 1
        new_tokens += tokens
        new_bytes += utf8_bytes
        if new_bytes >= _REPORT_BYTES:
            report(Contents(new_documents, new_tokens, new_bytes))
            new_documents = new_tokens = new_bytes = 0
    report(Contents(new_documents, new_tokens, new_bytes))
    return ChunkRecord(
        index=chunk.index,
        shards=(),
        lengths=tuple(lengths),
        repeated=len(repeated),
        checked=len(check.drawn),
        is_divided=is_divided,
        bad_rows=skipped.count,
        bad_places=tuple(skipped.places),
        empty=skipped.empty,
    )


def fingerprint_chunk(job: Job, chunk: Chunk, report: Report) -> None:
    """Write the fingerprints (hashes) of a chunk's documents to ``chunk.fingerprints_file``."""
    documents = documents_of(chunk, _open_source(job), job.request)
    fingerprints = b"".join(fingerprint_of(document, utf8_of(document)) for document in documents)
    buffer = io.BytesIO()
    np.save(buffer, np.frombuffer(fingerprints, dtype="<u8").reshape(-1, 2))
    open_folder(job.request.out).write(chunk.fingerprints_file, buffer.getvalue())


@functools.lru_cache(maxsize=1)
def _open_source(job: Job) -> Source:
    """Return the source of a job. Cached, because listing files is slow.

    Raises:
        DataError: files of the source have changed since the command began.
    """
    source = open_source(job.request)
    if sha256_of_json(identity_of(job.request, source)) != job.identity_sha256:
        raise changed_source_error(job.request)
    return source


def changed_source_error(request: TokenizeRequest) -> DataError:
    """Return the error for a source whose files changed while the command read them."""
    return DataError(
        f"--source {request.source}: its files changed while this command read them; when they no longer change, "
        f"delete {request.out} if it exists, and repeat the command"
    )


def _load_repeated(request: TokenizeRequest, chunk: Chunk) -> set[int]:
    if request.deduplicate != "exact":
        return set()
    content = open_folder(request.out).read(chunk.repeated_file)
    return set(np.load(io.BytesIO(content), allow_pickle=False).tolist())


class _ReferenceCheck:
    """Compares an encoder with tiktoken on the first document of a chunk and on a random sample."""

    def __init__(self, encoder: str, chunk: Chunk) -> None:
        self.drawn: list[tuple[int, AssignedDocument, EncodedDocument]] = []
        self._reference = None if encoder == REFERENCE_ENCODER else load_encoder(REFERENCE_ENCODER)
        self._encoder = encoder
        self._chunk = chunk
        self._random = random.Random(chunk.index)

    def draw(self, number: int, assigned: AssignedDocument, encoded: EncodedDocument) -> None:
        is_drawn = self._random.random() * _CHECK_ONE_IN < 1
        if self._reference is not None and (is_drawn or not self.drawn):
            self.drawn.append((number, assigned, encoded))

    def compare(self) -> None:
        """Raise DataError if tiktoken returns other tokens for one of the compared documents."""
        for number, assigned, encoded in self.drawn:
            assert self._reference is not None
            document = beginning_of(assigned.document, _CHECKED_CHARACTERS)
            expected = encode_document(self._reference, document).tokens
            tokens = encoded.tokens if document is assigned.document else encoded.tokens[: expected.size]
            if not np.array_equal(expected, tokens):
                raise DataError(
                    f"{self._chunk}: {self._encoder} and tiktoken encode document {number} (SHA-256 "
                    f"{assigned.fingerprint.hex()}...) differently; the chunk was not written: use --encoder tiktoken"
                )


class _SplitWriter:
    """Writes a chunk's documents of one split. Starts a new shard when a shard is full."""

    def __init__(self, scratch: Path, split: str, chunk: Chunk, request: TokenizeRequest) -> None:
        self._scratch = scratch
        self._split = split
        self._chunk = chunk
        self._request = request
        self._shard: ShardWriter | None = None
        self._finished: list[ShardRecord] = []

    def append(self, document: EncodedDocument, utf8_bytes: int) -> None:
        if self._shard is not None and self._shard.tokens + document.tokens.size > self._request.shard_tokens:
            self.close()
        if self._shard is None:
            file = f"{self._split}_{self._chunk.name}_{len(self._finished):03d}.{self._request.format}"
            self._shard = ShardWriter(self._scratch, file, self._split)
        self._shard.append(document.tokens, documents=1, utf8_bytes=utf8_bytes, scored=document.scored)

    def close(self) -> list[ShardRecord]:
        if self._shard is not None:
            self._finished.append(self._shard.close())
            self._shard = None
        return self._finished
