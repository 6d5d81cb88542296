"""The work of stage 1 as a list of chunks, which any process on any machine can do in any order.

A chunk is a part of the source and yields a part of the output: shards of its own. What chunks there are, and every
byte that they write, depends on the request alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from typing import Any

from data_tools.corpus.request import TokenizeRequest
from data_tools.encoding.documents import Document, utf8_of
from data_tools.sources import Slice, Source

#: As many chunks as keep the cores of a machine busy to the end, unless they become too small or too large.
_CHUNKS_WANTED = 64
_SMALLEST_CHUNK_BYTES = 4 << 20
# About what English text has; a chunk then fills one shard.
_BYTES_PER_TOKEN = 4


@dataclass(frozen=True)
class Chunk:
    """A part of the work.

    Attributes:
        index: names the chunk and its shards; chunks in this order give the documents in the source's order.
        slices: of the source.
        limit_documents: how many documents with text to take of them; None: all.
    """

    index: int
    slices: tuple[Slice, ...]
    limit_documents: int | None = None

    @property
    def name(self) -> str:
        """Five digits or more; names sort as chunks do, below 100,000 of them."""
        return f"{self.index:05d}"

    def __str__(self) -> str:
        return f"chunk {self.index} ({self.slices[0]}{', ...' if len(self.slices) > 1 else ''})"

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Chunk:
        """What ``to_json`` gave."""
        slices = tuple(Slice(**part) for part in value["slices"])
        return cls(value["index"], slices, value["limit_documents"])


def plan_chunks(source: Source, request: TokenizeRequest) -> list[Chunk]:
    """Cut the work. A limit of the request is found by reading up to it, without encoding.

    Raises:
        DataError: the source cannot be read.
    """
    largest = max(request.shard_tokens * _BYTES_PER_TOKEN, _SMALLEST_CHUNK_BYTES)
    text_bytes = source.text_bytes()
    wanted = largest if text_bytes is None else text_bytes // _CHUNKS_WANTED
    chunk_bytes = min(max(wanted, _SMALLEST_CHUNK_BYTES), largest)
    chunks = list(_group(source.slices(chunk_bytes), chunk_bytes))
    if request.limit_documents is None and request.limit_bytes is None:
        return chunks
    return list(_up_to_the_limit(chunks, source, request))


def documents_of(chunk: Chunk, source: Source) -> Iterator[Document]:
    """The chunk's documents that have text, in order."""
    texts = (document for part in chunk.slices for document in source.read(part) if document)
    return islice(texts, chunk.limit_documents)


def _group(slices: Sequence[Slice], chunk_bytes: int) -> Iterator[Chunk]:
    """Slices that follow each other, up to ``chunk_bytes``; one of unknown size is a chunk of its own."""
    index, group, size = 0, list[Slice](), 0
    for part in slices:
        part_bytes = chunk_bytes if part.text_bytes is None else part.text_bytes
        if group and size + part_bytes > chunk_bytes:
            yield Chunk(index, tuple(group))
            index, group, size = index + 1, [], 0
        group.append(part)
        size += part_bytes
    if group:
        yield Chunk(index, tuple(group))


def _up_to_the_limit(chunks: Sequence[Chunk], source: Source, request: TokenizeRequest) -> Iterator[Chunk]:
    """The first chunks, the last of them shortened: at ``limit_documents``, or behind what reaches ``limit_bytes``."""
    documents, utf8_bytes = 0, 0
    for chunk in chunks:
        for taken, document in enumerate(documents_of(chunk, source), start=1):
            documents += 1
            utf8_bytes += len(utf8_of(document))
            if documents == request.limit_documents or utf8_bytes >= (request.limit_bytes or float("inf")):
                yield replace(chunk, limit_documents=taken)
                return
        yield chunk


#: Told by a running chunk, now and then: documents, tokens and bytes of text since it was last told.
Report = Callable[[int, int, int], None]
