"""Divide the source into chunks. A chunk is a range of the source that one process encodes.

Each chunk has its own shards. Equal requests give equal chunks and equal shards.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from itertools import islice
from typing import Any

from pydantic import TypeAdapter, ValidationError

from data_tools.corpus.request import TokenizeRequest
from data_tools.encoding.documents import Document, utf8_of
from data_tools.errors import DataError
from data_tools.shards.contents import Contents
from data_tools.shards.manifest import ShardRecord
from data_tools.sources import BadRowError, Slice, Source, stop_at_bad_row

#: The subfolder with the records of finished chunks. It exists until the output folder is complete.
RECORDS_FOLDER = "tasks/"
#: The number of skipped rows that the report describes.
REPORTED_BAD_ROWS = 10
#: The target number of chunks. The real number can differ, because ``_chunk_bytes`` limits the size of a chunk.
_WANTED_CHUNKS = 64
_SMALLEST_CHUNK_BYTES = 4 << 20
# English text has about 4 bytes per token, so the largest chunk fills one shard.
_BYTES_PER_TOKEN = 4


@dataclass(frozen=True)
class Chunk:
    """A range of the source that one process encodes.

    Attributes:
        index: the position of the chunk in the source. The names of its shards contain this number.
        limit_documents: encode only the first ``limit_documents`` documents. Empty documents are not counted. None
            means no limit.
    """

    index: int
    slices: tuple[Slice, ...]
    limit_documents: int | None = None

    @property
    def name(self) -> str:
        """Return the index of the chunk as text, with at least five digits."""
        return f"{self.index:05d}"

    @property
    def record_file(self) -> str:
        """Return the name of the file with the ``ChunkRecord``. This file is written after the chunk's shards."""
        return f"{RECORDS_FOLDER}{self.name}.json"

    @property
    def fingerprints_file(self) -> str:
        """Return the name of a file with a 16-byte hash per document: uint64 of shape (documents, 2)."""
        return f"{RECORDS_FOLDER}{self.name}.fingerprints.npy"

    @property
    def repeated_file(self) -> str:
        """Return the name of the file that lists the chunk's repeated documents.

        A repeated document equals an earlier document of the source. The file contains positions in the chunk: int64 of
        shape (repeated,).
        """
        return f"{RECORDS_FOLDER}{self.name}.repeated.npy"

    def __str__(self) -> str:
        return f"chunk {self.index} ({self.slices[0]}{', ...' if len(self.slices) > 1 else ''})"

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Chunk:
        """Return a chunk from the JSON value of ``dataclasses.asdict(chunk)``."""
        return cls(value["index"], tuple(Slice(**fields) for fields in value["slices"]), value["limit_documents"])


@dataclass(frozen=True)
class ChunkRecord:
    """The results of a finished chunk.

    Attributes:
        lengths: entry k is the number of documents with 2**k to 2**(k+1) - 1 tokens.
        repeated: the number of documents left out because they equal an earlier document.
        checked: the number of documents whose tokens were compared with tiktoken's.
        is_divided: whether the chunk is a single text that was divided between the splits.
        bad_rows: the number of rows left out because they cannot be read.
        bad_places: messages about the first ``REPORTED_BAD_ROWS`` of these rows.
        empty: the number of empty documents, which are left out.
    """

    index: int
    shards: tuple[ShardRecord, ...]
    lengths: tuple[int, ...]
    repeated: int
    checked: int
    is_divided: bool = False
    bad_rows: int = 0
    bad_places: tuple[str, ...] = ()
    empty: int = 0

    @property
    def progress(self) -> Contents:
        """Return the numbers of documents, tokens and bytes of text in all shards of the chunk."""
        return sum((Contents(shard.documents, shard.tokens, shard.utf8_bytes) for shard in self.shards), Contents())

    def to_bytes(self) -> bytes:
        """Return this record as JSON text."""
        return json.dumps({**asdict(self), "shards": [shard.to_json() for shard in self.shards]}).encode("ascii")

    @classmethod
    def from_bytes(cls, content: bytes, place: str) -> ChunkRecord:
        """Return a record from the JSON text of ``to_bytes``. Error messages contain ``place``."""
        try:
            return _record_schema().validate_json(content)
        except ValidationError as error:
            raise DataError(f"{place} is damaged; delete it to make its shards again") from error


@cache
def _record_schema() -> TypeAdapter[ChunkRecord]:
    return TypeAdapter(ChunkRecord)


class SkippedRows:
    """Counts empty documents and rows that cannot be read."""

    def __init__(self) -> None:
        self.count = 0
        self.empty = 0
        self.places: list[str] = []

    def add(self, error: BadRowError) -> None:
        """Count a row that cannot be read. Keep the messages of the first ``REPORTED_BAD_ROWS`` such rows."""
        self.count += 1
        if len(self.places) < REPORTED_BAD_ROWS:
            self.places.append(str(error).encode(errors="backslashreplace").decode())

    def keep(self, document: Document) -> bool:
        """Return whether a document has text. Count it if it is empty."""
        self.empty += not document
        return bool(document)


def plan_chunks(source: Source, request: TokenizeRequest) -> list[Chunk]:
    """Divide a source into chunks.

    If the request limits the number of documents or bytes, the function reads documents until the limit is reached. The
    last chunk ends there.
    """
    text_bytes = source.text_bytes()
    chunk_bytes = _chunk_bytes(text_bytes, request)
    slices = source.slices(chunk_bytes)
    sizes = [source_slice.text_bytes for source_slice in slices]
    if text_bytes is None and None not in sizes:
        chunk_bytes = _chunk_bytes(sum(filter(None, sizes)), request)
    groups: list[list[Slice]] = []
    group_bytes = 0
    for source_slice, size in zip(slices, sizes, strict=True):
        slice_bytes = chunk_bytes if size is None else size  # unknown: counts as a full chunk
        if groups and group_bytes + slice_bytes <= chunk_bytes:
            groups[-1].append(source_slice)
            group_bytes += slice_bytes
        else:
            groups.append([source_slice])
            group_bytes = slice_bytes
    chunks = [Chunk(index, tuple(group)) for index, group in enumerate(groups)]
    if request.limit_documents is None and request.limit_bytes is None:
        return chunks
    return list(_apply_limit(chunks, source, request))


def _chunk_bytes(text_bytes: int | None, request: TokenizeRequest) -> int:
    largest = max(request.shard_tokens * _BYTES_PER_TOKEN, _SMALLEST_CHUNK_BYTES)
    wanted = largest if text_bytes is None else text_bytes // _WANTED_CHUNKS
    return min(max(wanted, _SMALLEST_CHUNK_BYTES), largest)


def documents_of(
    chunk: Chunk, source: Source, request: TokenizeRequest, skipped: SkippedRows | None = None
) -> Iterator[Document]:
    """Yield the non-empty documents of a chunk, in the order of the source.

    ``skipped`` counts empty documents and rows that cannot be read.

    Raises:
        DataError: a row cannot be read, and ``on_bad_rows`` is ``stop``.
    """
    skipped = SkippedRows() if skipped is None else skipped
    on_bad_row = stop_at_bad_row if request.on_bad_rows == "stop" else skipped.add
    documents = (document for source_slice in chunk.slices for document in source.read(source_slice, on_bad_row))
    return islice(filter(skipped.keep, documents), chunk.limit_documents)


def _apply_limit(chunks: Sequence[Chunk], source: Source, request: TokenizeRequest) -> Iterator[Chunk]:
    documents, utf8_bytes = 0, 0
    for chunk in chunks:
        for taken, document in enumerate(documents_of(chunk, source, request), start=1):
            documents += 1
            utf8_bytes += len(utf8_of(document))
            if documents == request.limit_documents or utf8_bytes >= (request.limit_bytes or float("inf")):
                yield replace(chunk, limit_documents=taken)
                return
        yield chunk
