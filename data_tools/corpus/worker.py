"""What a process does with one chunk: read, encode, check, divide, write."""

from __future__ import annotations

import functools
import io
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from data_tools.corpus.chunks import Chunk, Report, documents_of
from data_tools.corpus.output import fingerprints_name, publish_chunk, repeated_name
from data_tools.corpus.records import ChunkRecord, LengthCounts
from data_tools.corpus.request import TokenizeRequest
from data_tools.corpus.split import draw_split
from data_tools.encoding.documents import Document, EncodedDocument, encode_document, fingerprint_of, utf8_of
from data_tools.encoding.encoders import REFERENCE_ENCODER, Encoder, load_encoder
from data_tools.errors import DataError
from data_tools.shards import TRAIN_SPLIT, VAL_SPLIT, ShardRecord, ShardWriter
from data_tools.sources import Source, open_source
from data_tools.storage.files import sha256_of_json
from data_tools.storage.folders import open_folder, scratch_of

_REPORT_BYTES = 1 << 20
#: One document in so many is encoded by tiktoken too, besides the first of each chunk.
_CHECK_ONE_IN = 512


@dataclass(frozen=True)
class Job:
    """What all chunks of a run share.

    Attributes:
        request: of the run.
        encoder: by its own name.
        one_chunk: the chunk is the whole corpus, and has to see to it that both splits get a document.
        identity_sha256: of the request's identity, by which a process knows that it has the same source before it.
    """

    request: TokenizeRequest
    encoder: str
    one_chunk: bool
    identity_sha256: str


@dataclass(frozen=True)
class _Assigned:
    """A document, its text in UTF-8, what tells it apart, and where it goes."""

    document: Document
    utf8: bytes
    fingerprint: bytes
    split: str


def encode_chunk(job: Job, chunk: Chunk, report: Report) -> ChunkRecord:
    """Write the shards of a chunk and its record; what was there of it before is replaced.

    Raises:
        DataError: a document cannot be read, tokens differ from tiktoken's, or the disk refuses.
    """
    folder = open_folder(job.request.out)
    encoder = load_encoder(job.encoder)
    check = _SampleCheck(encoder, chunk)
    repeated = _repeated(job, chunk)
    lengths = LengthCounts()
    with scratch_of(folder) as scratch:
        writers = {split: _PartWriter(scratch, split, chunk, job.request) for split in (TRAIN_SPLIT, VAL_SPLIT)}
        pending = _Pending(report)
        for number, assigned in enumerate(_assigned(job, chunk)):
            if number in repeated:
                continue
            encoded = encode_document(encoder, assigned.document)
            check.compare(number, assigned, encoded)
            writers[assigned.split].append(encoded, len(assigned.utf8))
            lengths.add(encoded.tokens.size)
            pending.add(encoded.tokens.size, len(assigned.utf8))
        shards = tuple(shard for writer in writers.values() for shard in writer.close())
        pending.flush()
        record = ChunkRecord(chunk.index, shards, lengths.to_tuple(), len(repeated), check.checked)
        publish_chunk(folder, chunk, record, scratch)
    return record


def fingerprint_chunk(job: Job, chunk: Chunk, report: Report) -> None:
    """Write what tells the chunk's documents apart: uint64 of shape (documents, 2).

    Raises:
        DataError: a document cannot be read, or the disk refuses.
    """
    documents = documents_of(chunk, _source(job.request, job.identity_sha256))
    fingerprints = b"".join(fingerprint_of(document, utf8_of(document)) for document in documents)
    buffer = io.BytesIO()
    np.save(buffer, np.frombuffer(fingerprints, dtype="<u8").reshape(-1, 2))
    open_folder(job.request.out).write(fingerprints_name(chunk), buffer.getvalue())


@functools.lru_cache(maxsize=1)
def _source(request: TokenizeRequest, identity_sha256: str) -> Source:
    """Listing files takes time; a process does it once for each run."""
    source = open_source(request)
    if sha256_of_json(request.identity(source)) != identity_sha256:
        raise DataError(f"--source {request.source}: its files changed since the run began; start again")
    return source


def _repeated(job: Job, chunk: Chunk) -> set[int]:
    """Numbers of the chunk's documents that have an equal one before them in the corpus."""
    if job.request.deduplicate != "exact":
        return set()
    content = open_folder(job.request.out).read(repeated_name(chunk))
    return set(np.load(io.BytesIO(content), allow_pickle=False).tolist())


def _assigned(job: Job, chunk: Chunk) -> Iterator[_Assigned]:
    """Each document with its split."""
    request = job.request

    def assign(document: Document) -> _Assigned:
        utf8 = utf8_of(document)
        fingerprint = fingerprint_of(document, utf8)
        split = draw_split(fingerprint, val_fraction=request.val_fraction, seed=request.seed)
        return _Assigned(document, utf8, fingerprint, split)

    assigned = map(assign, documents_of(chunk, _source(request, job.identity_sha256)))
    return _in_both_splits(assigned) if job.one_chunk and request.val_fraction > 0 else assigned


def _in_both_splits(assigned: Iterator[_Assigned]) -> Iterator[_Assigned]:
    """Of a small corpus, whose draws may all fall on one side, the last document to be new goes to the other.

    So do its repeats: equal documents stay on one side. A single document is for training.
    """
    held: list[_Assigned] = []  # the last one to be new, and the repeats after it
    seen: set[bytes] = set()
    for following in assigned:
        if held and following.split != held[0].split:
            yield from (*held, following)
            yield from assigned
            return
        if following.fingerprint not in seen:
            yield from held
            held = []
        seen.add(following.fingerprint)
        held.append(following)
    other = {TRAIN_SPLIT: VAL_SPLIT, VAL_SPLIT: TRAIN_SPLIT}
    for repeat in held:
        moves = repeat.fingerprint == held[0].fingerprint
        split = TRAIN_SPLIT if len(seen) == 1 else other[repeat.split] if moves else repeat.split
        yield replace(repeat, split=split)


class _Pending:
    """Reports in portions: telling costs more than encoding a short document."""

    def __init__(self, report: Report) -> None:
        self._report = report
        self._documents = self._tokens = self._utf8_bytes = 0

    def add(self, tokens: int, utf8_bytes: int) -> None:
        self._documents += 1
        self._tokens += tokens
        self._utf8_bytes += utf8_bytes
        if self._utf8_bytes >= _REPORT_BYTES:
            self.flush()

    def flush(self) -> None:
        self._report(self._documents, self._tokens, self._utf8_bytes)
        self._documents = self._tokens = self._utf8_bytes = 0


class _SampleCheck:
    """Compares an encoder with tiktoken on the first document of a chunk and on one in some hundreds."""

    def __init__(self, encoder: Encoder, chunk: Chunk) -> None:
        self.checked = 0
        self._reference = None if encoder.name == REFERENCE_ENCODER else load_encoder(REFERENCE_ENCODER)
        self._name = encoder.name
        self._chunk = chunk

    def compare(self, number: int, assigned: _Assigned, encoded: EncodedDocument) -> None:
        drawn = int.from_bytes(assigned.fingerprint[-8:], "little") % _CHECK_ONE_IN == 0
        if self._reference is None or not (drawn or self.checked == 0):
            return
        self.checked += 1
        expected = encode_document(self._reference, assigned.document).tokens
        if not np.array_equal(expected, encoded.tokens):
            raise DataError(
                f"{self._chunk}: document {number} (SHA-256 {assigned.fingerprint.hex()}...) has other tokens by "
                f"{self._name} than by tiktoken; nothing of the chunk is kept: use --encoder tiktoken"
            )


class _PartWriter:
    """The shards of one split that a chunk writes, one after the other."""

    def __init__(self, scratch: Path, split: str, chunk: Chunk, request: TokenizeRequest) -> None:
        self._scratch = scratch
        self._prefix = f"{split}_{chunk.name}"
        self._split = split
        self._format = request.format
        self._shard_tokens = request.shard_tokens
        self._shard: ShardWriter | None = None
        self._finished: list[ShardRecord] = []

    def append(self, document: EncodedDocument, utf8_bytes: int) -> None:
        size = document.tokens.size
        if self._shard is not None and self._shard.tokens + size > self._shard_tokens:
            self._finished.append(self._shard.close())
            self._shard = None
        if self._shard is None:
            file = f"{self._prefix}_{len(self._finished):03d}.{self._format}"
            self._shard = ShardWriter(self._scratch, file, self._split)
        self._shard.append(document.tokens, documents=1, utf8_bytes=utf8_bytes, scored=document.scored)

    def close(self) -> list[ShardRecord]:
        if self._shard is not None:
            self._finished.append(self._shard.close())
            self._shard = None
        return self._finished
