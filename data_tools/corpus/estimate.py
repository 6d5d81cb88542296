"""Estimate the bytes that a tokenize request will write, and compare them with the free disk space."""

from collections.abc import Sequence
from dataclasses import dataclass

from data_tools.corpus.chunks import Chunk, SkippedRows, documents_of
from data_tools.corpus.request import TokenizeRequest
from data_tools.corpus.worker_server import WORKER_BYTES, workers_of
from data_tools.encoding.documents import encode_document, text_of, utf8_of
from data_tools.encoding.encoders import REFERENCE_ENCODER, load_encoder
from data_tools.errors import DataError
from data_tools.formatting import count_of, format_size
from data_tools.limits import memory_limit
from data_tools.sources import Source

_SAMPLE_BYTES = 256 << 10
_TOKEN_BYTES = 2
# The memory of a process that holds a text completely, apart from the text, and the most memory per byte of the text.
# docs/benchmarks/data.md has the measurements.
_BASE_BYTES = 200 << 20
_MEMORY_PER_TEXT_BYTE = 20


@dataclass(frozen=True)
class Estimate:
    """An estimate of the work for a tokenize request.

    Attributes:
        text_bytes: the bytes of text in the source, or None if unknown.
        free_bytes: the free disk space for the output folder, or None if unknown.
        chunks: the number of chunks, including finished chunks.
        memory_bytes: the most memory that all processes together need. The sizes of compressed texts are estimated,
            and large documents inside a file or at a URL are not known.
        memory_limit_bytes: the memory that the processes may use.
    """

    text_bytes: int | None
    bytes_per_token: float
    free_bytes: int | None
    chunks: int
    workers: int
    memory_bytes: int
    memory_limit_bytes: int

    @property
    def tokens(self) -> int | None:
        """Return the estimated number of tokens, or None if unknown."""
        return None if self.text_bytes is None else int(self.text_bytes / self.bytes_per_token)

    @property
    def shard_bytes(self) -> int | None:
        """Return the estimated size of all shards, or None if unknown."""
        return None if self.tokens is None else self.tokens * _TOKEN_BYTES

    def __str__(self) -> str:
        free = "" if self.free_bytes is None else f" ({format_size(self.free_bytes)} free)"
        if self.tokens is None or self.text_bytes is None or self.shard_bytes is None:
            size = f"text of unknown size, {self.bytes_per_token:.1f} bytes per token{free}"
        else:
            size = (
                f"about {format_size(self.text_bytes)} of text, {self.tokens:,} tokens, "
                f"{format_size(self.shard_bytes)} on the disk{free}"
            )
        memory = format_size(self.memory_bytes)
        limit = format_size(self.memory_limit_bytes)
        work = f"{count_of(self.chunks, 'chunk')}, {count_of(self.workers, 'process', 'processes')}"
        return f"{size}; {work}, up to {memory} of the {limit} of memory"


def estimate_run(request: TokenizeRequest, source: Source, chunks: Sequence[Chunk], free_bytes: int | None) -> Estimate:
    """Estimate the work for a request. Encode the first documents to measure ``bytes_per_token``.

    Raises:
        DataError: no document has text.
    """
    text_bytes = tokens = 0
    skipped = SkippedRows()
    encoder = load_encoder(REFERENCE_ENCODER)  # fast enough for a few documents, and also needed later
    documents = (document for chunk in chunks for document in documents_of(chunk, source, request, skipped))
    for document in documents:
        # A single document can have hundreds of megabytes, for which tiktoken needs minutes.
        text = text_of(document)[:_SAMPLE_BYTES]
        text_bytes += len(utf8_of(text))
        tokens += encode_document(encoder, text).tokens.size
        if text_bytes >= _SAMPLE_BYTES:
            break
    if not tokens:
        cause = "there is nothing to tokenize"
        if skipped.count:
            cause = f"{skipped.count:,} rows cannot be read, the first is {skipped.places[0]}"
        raise DataError(f"--source {request.source} has no document with text in it; {cause}")
    is_limited = request.limit_documents is not None or request.limit_bytes is not None
    workers = min(workers_of(request), len(chunks))
    return Estimate(
        text_bytes=None if is_limited else source.text_bytes(),
        bytes_per_token=text_bytes / tokens,
        free_bytes=free_bytes,
        chunks=len(chunks),
        workers=workers,
        memory_bytes=_estimate_memory(source, workers),
        memory_limit_bytes=memory_limit(),
    )


def _estimate_memory(source: Source, workers: int) -> int:
    """Return the memory of all processes if they hold the largest texts at the same time."""
    large_texts = source.whole_texts(workers, (WORKER_BYTES - _BASE_BYTES) // _MEMORY_PER_TEXT_BYTE)
    memory_of_texts = len(large_texts) * _BASE_BYTES + sum(large_texts) * _MEMORY_PER_TEXT_BYTE
    return (workers - len(large_texts)) * WORKER_BYTES + memory_of_texts


def check_free_space(estimate: Estimate, written_bytes: int, place: str) -> None:
    """Raise DataError if the free disk space is too small for the remaining shards.

    ``written_bytes`` is the size of the shards that already exist.
    """
    if estimate.shard_bytes is None or estimate.free_bytes is None:
        return
    needed_bytes = estimate.shard_bytes - written_bytes
    if needed_bytes > estimate.free_bytes:
        raise DataError(
            f"{place} needs about {format_size(needed_bytes)} for shards, {format_size(estimate.free_bytes)} are "
            "free; name another --out, or tokenize less (--limit-bytes)"
        )
