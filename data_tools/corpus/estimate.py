"""How much a run will write, before it starts: estimated from a sample, compared with the room on the disk."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from data_tools.corpus.chunks import Chunk, documents_of
from data_tools.encoding.documents import encode_document, utf8_of
from data_tools.encoding.encoders import REFERENCE_ENCODER, load_encoder
from data_tools.errors import DataError
from data_tools.sources import Source

_SAMPLE_BYTES = 256 << 10
_TOKEN_BYTES = 2
#: Of one process while it encodes; measured, see docs/benchmarks/data.md.
WORKER_BYTES = 350 << 20


@dataclass(frozen=True)
class Estimate:
    """What a run is about to do.

    Attributes:
        text_bytes: of the source; None: not known before reading.
        bytes_per_token: in a sample of the first documents.
        free_bytes: room at the output; None: there is no knowing.
        chunks: of the run, finished ones included.
        workers: processes on this machine.
    """

    text_bytes: int | None
    bytes_per_token: float
    free_bytes: int | None
    chunks: int
    workers: int

    @property
    def tokens(self) -> int | None:
        """Tokens that the whole source gives."""
        return None if self.text_bytes is None else int(self.text_bytes / self.bytes_per_token)

    @property
    def shard_bytes(self) -> int | None:
        """Bytes that its shards take."""
        return None if self.tokens is None else self.tokens * _TOKEN_BYTES

    def __str__(self) -> str:
        free = "" if self.free_bytes is None else f" of {_gigabytes(self.free_bytes)} free"
        if self.tokens is None or self.text_bytes is None or self.shard_bytes is None:
            size = f"of unknown size, {self.bytes_per_token:.1f} bytes a token{free and ', room' + free[3:]}"
        else:
            size = (
                f"about {_gigabytes(self.text_bytes)} of text, {self.tokens:,} tokens, "
                f"{_gigabytes(self.shard_bytes)} in shards{free}"
            )
        memory = f"{_gigabytes(self.workers * WORKER_BYTES)} of memory"
        return f"{size}; {self.chunks:,} chunks, {self.workers} processes, up to {memory}"


def estimate(
    source: Source, chunks: Sequence[Chunk], free_bytes: int | None, workers: int, *, limited: bool
) -> Estimate | None:
    """Look at the first documents; None: there is not one.

    Args:
        limited: the chunks are not all of the source, whose size then says nothing.

    Raises:
        DataError: the first documents cannot be read.
    """
    text, tokens = 0, 0
    encoder = load_encoder(REFERENCE_ENCODER)  # it is loaded anyway; a sample needs no speed
    for chunk in chunks:
        for document in documents_of(chunk, source):
            text += len(utf8_of(document))
            tokens += encode_document(encoder, document).tokens.size
            if text >= _SAMPLE_BYTES:
                break
        if text >= _SAMPLE_BYTES:
            break
    if not tokens:
        return None
    text_bytes = None if limited else source.text_bytes()
    return Estimate(text_bytes, text / tokens, free_bytes, len(chunks), min(workers, len(chunks)))


def expect_room(estimated: Estimate, written_bytes: int, place: str) -> None:
    """Refuse what will not fit.

    Args:
        written_bytes: what finished chunks have written already.

    Raises:
        DataError: names what is needed and what is there.
    """
    if estimated.shard_bytes is None or estimated.free_bytes is None:
        return
    needed = estimated.shard_bytes - written_bytes
    if needed > estimated.free_bytes:
        raise DataError(
            f"{place} needs about {_gigabytes(needed)} for shards, {_gigabytes(estimated.free_bytes)} are free; "
            "name another --out, or tokenize less (--limit-bytes)"
        )


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:,.2f} GB" if size >= 10_000_000 else f"{size / 1e6:,.2f} MB"
