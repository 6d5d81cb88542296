"""The indexed data sets of Megatron-LM and gpt-neox: tokens in ``X.bin``, sequences and documents in ``X.idx``.

Their ``MMapIndexedDataset`` writes the index, little-endian: magic, version (uint64), type of the tokens (uint8),
number of sequences, number of document boundaries (uint64 each); then the sizes of the sequences in tokens (int32),
their offsets in ``X.bin`` in bytes (int64), and the document boundaries as numbers of sequences (int64; the first is 0,
the last is the number of sequences).
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from data_tools.arrays import CountArray, TokenArray
from data_tools.errors import DataError
from data_tools.formats.collection import TokenCollection, map_file, open_foreign
from data_tools.shards.contents import require_in_vocabulary
from data_tools.tokenizer import END_OF_TEXT

MEGATRON = "megatron"
INDEX_SUFFIX = ".idx"
BLOCK_DOCUMENTS = 1 << 16  # documents that are processed together, so that memory does not grow with their number
_BLOCK_ENTRIES = 1 << 18  # entries of an index that are checked together, for the same reason
_MAGIC = b"MMIDIDX\x00\x00"
_OLDER_MAGIC = b"TNTIDX\x00\x00"
_VERSION = 1
_HEADER = struct.Struct("<9sQBQQ")
_DTYPES: dict[int, np.dtype[Any]] = {4: np.dtype("<i4"), 8: np.dtype("<u2")}
_REFUSED_DTYPES = {1: "uint8", 2: "int8", 3: "int16", 5: "int64", 6: "floating point", 7: "floating point"}


def open_megatron(path: Path, indices: Sequence[Path], split_of: Mapping[str, str]) -> TokenCollection:
    """Open pairs of ``.idx`` and ``.bin``.

    Raises:
        DataError: a file is damaged, missing or has tokens of another type, or its split is unknown.
    """
    files = [file for index in indices for file in (index, _tokens_file_of(index))]
    return open_foreign(path, MEGATRON, indices, split_of, MegatronTokens, files_on_disk=files)


def is_index(path: Path) -> bool:
    """Return whether a file begins like an index, of this format or the older one.

    Raises:
        OSError: it cannot be read.
    """
    with open(path, "rb") as file:
        return file.read(len(_MAGIC)).startswith((_MAGIC, _OLDER_MAGIC))


class MegatronTokens:
    """The documents of one pair of files as a stream in our order: ``END_OF_TEXT`` before each document.

    One ``END_OF_TEXT`` at the end of a document, which ``--append-eod`` writes, is dropped, because the one before the
    next document replaces it.

    Attributes:
        tokens: the length of the stream, one ``END_OF_TEXT`` per document included.
    """

    def __init__(self, index: Path, vocab_size: int) -> None:
        """Open the pair. Reads the whole index and the last token of each document.

        Raises:
            DataError: a file is missing, damaged, or has tokens of another type.
        """
        self._path = _tokens_file_of(index)
        self._vocab_size = vocab_size
        self._index = _read_index(index)
        self._text = self._map_text()
        self._blocks = range(0, self._index.documents, BLOCK_DOCUMENTS)
        ends = np.cumsum([int(_lengths(*self._documents(block)).sum()) for block in self._blocks], dtype=np.int64)
        self._block_ends = ends
        self.tokens = int(ends[-1]) if ends.size else 0

    def read(self, start: int, length: int) -> TokenArray:
        assert start >= 0 and length >= 0 and start + length <= self.tokens
        tokens = np.empty(length, dtype=np.uint16)
        filled = 0
        while filled < length:
            block = int(np.searchsorted(self._block_ends, start + filled, side="right"))
            block_start = int(self._block_ends[block - 1]) if block else 0
            piece = tokens[filled : filled + int(self._block_ends[block]) - start - filled]
            self._fill(piece, self._blocks[block], start + filled - block_start)
            filled += piece.size
        return tokens

    def _map_text(self) -> npt.NDArray[np.integer[Any]]:
        content = map_file(self._path)
        index = self._index
        if content.size != index.tokens * index.dtype.itemsize:
            raise DataError(
                f"{self._path} has {content.size} bytes, its index accounts for {index.tokens * index.dtype.itemsize} "
                f"({index.tokens} tokens of {index.dtype.name})"
            )
        return np.frombuffer(content, index.dtype) if content.size else np.empty(0, index.dtype)

    def _fill(self, tokens: TokenArray, block: int, start: int) -> None:
        """Fill ``tokens`` with the stream of a block's documents from position ``start`` on."""
        text_starts, text_stops = self._documents(block)
        lengths = _lengths(text_starts, text_stops)
        # Position of each document's END_OF_TEXT in ``tokens``; the first document may begin before it.
        separators = np.cumsum(lengths) - lengths - start
        first = int(np.searchsorted(separators, 0, side="right")) - 1
        stop = int(np.searchsorted(separators, tokens.size))
        separators, text_starts, text_stops = separators[first:stop], text_starts[first:stop], text_stops[first:stop]
        text = self._text_of(
            np.maximum(text_starts, text_starts - separators - 1),
            np.minimum(text_stops, text_starts - separators - 1 + tokens.size),
        )
        is_text = np.ones(tokens.size, dtype=np.bool_)
        is_text[separators[separators >= 0]] = False
        tokens[is_text] = text
        tokens[~is_text] = END_OF_TEXT

    def _text_of(self, starts: CountArray, stops: CountArray) -> npt.NDArray[np.integer[Any]]:
        """Return the text between consecutive starts and stops, without the ``END_OF_TEXT`` in the gaps."""
        begin, end = int(starts[0]), int(stops[-1])
        text = self._text[begin:end]
        require_in_vocabulary(text, self._vocab_size, self._path)
        gaps = stops[:-1][stops[:-1] < starts[1:]]
        return np.delete(text, gaps - begin)

    def _documents(self, block: int) -> tuple[CountArray, CountArray]:
        """Return the start and stop of each text of a block's documents in the file, int64 of shape (documents,)."""
        boundaries = self._index.text_starts(block, min(block + BLOCK_DOCUMENTS, self._index.documents) + 1)
        starts, ends = boundaries[:-1], boundaries[1:]
        is_separated = np.zeros(starts.size, dtype=np.bool_)
        holds_tokens = ends > starts
        is_separated[holds_tokens] = self._text[ends[holds_tokens] - 1] == END_OF_TEXT
        return starts, ends - is_separated


@dataclass(frozen=True)
class _Index:
    """A mapped index whose every entry was checked: sequences follow each other without gaps."""

    dtype: np.dtype[Any]  # of the tokens: uint16 or int32
    tokens: int
    documents: int
    pointers: CountArray
    boundaries: CountArray

    def text_starts(self, first: int, stop: int) -> CountArray:
        """Return where documents ``first`` to ``stop`` begin in the tokens, int64; one past the last is the end."""
        sequences = self.boundaries[first:stop]
        starts = np.full(sequences.size, self.tokens, dtype=np.int64)
        is_sequence = sequences < self.pointers.size
        starts[is_sequence] = self.pointers[sequences[is_sequence]] // self.dtype.itemsize
        return starts


def _read_index(path: Path) -> _Index:
    content = map_file(path)
    if content.size < _HEADER.size:
        raise DataError(f"{path} is not a whole index: it ends after {content.size} bytes, within its header")
    magic, version, code, sequences, boundaries = _HEADER.unpack(memoryview(content)[: _HEADER.size])
    _check_header(path, magic, version, code)
    size = _HEADER.size + sequences * (4 + 8) + boundaries * 8
    if content.size != size:
        raise DataError(
            f"{path} is not a whole index: {sequences} sequences and {boundaries} document boundaries "
            f"take {size} bytes, it has {content.size}"
        )
    sizes = np.frombuffer(content, "<i4", sequences, _HEADER.size)
    pointers = np.frombuffer(content, "<i8", sequences, _HEADER.size + sequences * 4)
    document_boundaries = np.frombuffer(content, "<i8", boundaries, size - boundaries * 8)
    dtype = _DTYPES[code]
    tokens = _count_tokens(path, sizes, pointers, dtype.itemsize)
    _check_boundaries(path, document_boundaries, sequences)
    return _Index(dtype, tokens, boundaries - 1, pointers, document_boundaries)


def _check_header(path: Path, magic: bytes, version: int, code: int) -> None:
    if magic.startswith(_OLDER_MAGIC):
        raise DataError(
            f"{path} is an index of the older kind (cached, lazy); preprocess again with --dataset-impl mmap"
        )
    if magic != _MAGIC:
        raise DataError(f"{path} is not an index of Megatron: its magic is {magic!r}, it must be {_MAGIC!r}")
    if version != _VERSION:
        raise DataError(f"{path}: its version is {version}, it must be {_VERSION}")
    if code not in _DTYPES:
        kind = _REFUSED_DTYPES.get(code, "unknown")
        raise DataError(f"{path}: its tokens are of type {code} ({kind}), they must be of 8 (uint16) or 4 (int32)")


def _count_tokens(path: Path, sizes: npt.NDArray[np.int32], pointers: CountArray, token_bytes: int) -> int:
    """Return the number of tokens. Each sequence must begin where the one before it ends."""
    total_bytes = 0
    for first in range(0, sizes.size, _BLOCK_ENTRIES):
        block = sizes[first : first + _BLOCK_ENTRIES].astype(np.int64)
        if (block < 0).any():
            at = int(np.argmax(block < 0))
            raise DataError(f"{path}: sequence {first + at} has the size {block[at]}, it must be 0 or more")
        ends = total_bytes + np.cumsum(block * token_bytes)
        starts = ends - block * token_bytes
        wrong = pointers[first : first + _BLOCK_ENTRIES] != starts
        if wrong.any():
            at = int(np.argmax(wrong))
            raise DataError(
                f"{path}: sequence {first + at} is said to begin at byte {pointers[first + at]}, "
                f"those before it end at byte {starts[at]}"
            )
        total_bytes = int(ends[-1])
    return total_bytes // token_bytes


def _check_boundaries(path: Path, boundaries: CountArray, sequences: int) -> None:
    if boundaries.size == 0 or boundaries[0] != 0 or boundaries[-1] != sequences:
        ends = f"from {boundaries[0]} to {boundaries[-1]}" if boundaries.size else "none at all"
        raise DataError(f"{path}: its document boundaries must go from 0 to {sequences}, they are {ends}")
    for first in range(0, boundaries.size - 1, _BLOCK_ENTRIES):
        backwards = np.diff(boundaries[first : first + _BLOCK_ENTRIES + 1]) < 0
        if backwards.any():
            raise DataError(f"{path}: document {first + int(np.argmax(backwards))} ends before it begins")


def _tokens_file_of(index: Path) -> Path:
    return index.with_suffix(".bin")


def _lengths(text_starts: CountArray, text_stops: CountArray) -> CountArray:
    """Return the tokens of each document, with the ``END_OF_TEXT`` before it."""
    return text_stops - text_starts + 1
