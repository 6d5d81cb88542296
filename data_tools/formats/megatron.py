"""Read datasets of Megatron-LM and gpt-neox.

``X.bin`` contains the tokens. The index ``X.idx``, written by ``MMapIndexedDataset``, says where sequences and
documents begin. All values in the index are little-endian:

1. the magic number, the version (uint64) and a code for the dtype of the tokens (uint8);
2. the number of sequences and the number of document boundaries (uint64 each);
3. the length of each sequence in tokens (int32);
4. the offset of each sequence in ``X.bin`` in bytes (int64);
5. the document boundaries (int64): the number of sequences before each boundary. The first number is 0, and the last
   is the number of all sequences.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from data_tools.arrays import CountArray, TokenArray
from data_tools.errors import DataError
from data_tools.formats.collection import Concatenated, Tokens, map_file, require_tokens
from data_tools.shards.contents import require_in_vocabulary
from data_tools.vocabulary import END_OF_TEXT

MEGATRON = "megatron"
INDEX_SUFFIX = ".idx"
BLOCK_DOCUMENTS = 1 << 16  # documents that are processed together, to limit memory
_BLOCK_ENTRIES = 1 << 18  # entries of an index that are checked together, to limit memory
_MAGIC = b"MMIDIDX\x00\x00"
_OLDER_MAGIC = b"TNTIDX\x00\x00"
_VERSION = 1
_HEADER = struct.Struct("<9sQBQQ")
_DTYPES: dict[int, np.dtype[Any]] = {4: np.dtype("<i4"), 8: np.dtype("<u2")}
_REFUSED_DTYPES = {1: "uint8", 2: "int8", 3: "int16", 5: "int64", 6: "floating point", 7: "floating point"}


def is_index(path: Path) -> bool:
    """Return whether a file begins like an index of Megatron-LM. Raise OSError if it cannot be read."""
    with open(path, "rb") as file:
        return file.read(len(_MAGIC)).startswith((_MAGIC, _OLDER_MAGIC))


def open_megatron_pair(index_path: Path, vocab_size: int) -> Tokens:
    """Open ``X.idx`` and ``X.bin`` as one stream of tokens. The stream has ``END_OF_TEXT`` before each document.

    If a document in ``X.bin`` ends with ``END_OF_TEXT``, the stream leaves out this token. This function reads only
    the index and the last token of each document.

    All tokens must be below ``vocab_size``.

    Raises:
        DataError: a file is damaged, or the type of the tokens is not supported.
    """
    path = tokens_file_of(index_path)
    index = _read_index(index_path)
    content = map_file(path)
    if content.size != index.tokens * index.dtype.itemsize:
        raise DataError(
            f"{path} has {content.size} bytes, its index accounts for {index.tokens * index.dtype.itemsize} "
            f"({index.tokens} tokens of {index.dtype.name})"
        )
    require_tokens(path, index.tokens)
    text = np.frombuffer(content, index.dtype)
    blocks = range(0, index.documents, BLOCK_DOCUMENTS)
    return Concatenated([_DocumentBlock(path, text, index, first, vocab_size) for first in blocks])


class _DocumentBlock:
    def __init__(
        self, path: Path, text: npt.NDArray[np.integer[Any]], index: _Index, first: int, vocab_size: int
    ) -> None:
        self._path = path
        self._text = text
        self._index = index
        self._first = first
        self._vocab_size = vocab_size
        self.tokens = int(_lengths(*self._documents()).sum())

    def read(self, start: int, length: int) -> TokenArray:
        text_starts, text_stops = self._documents()
        lengths = _lengths(text_starts, text_stops)
        # The position of each document's END_OF_TEXT in the result, negative if the document begins before the result.
        separators = np.cumsum(lengths) - lengths - start
        first = int(np.searchsorted(separators, 0, side="right")) - 1
        stop = int(np.searchsorted(separators, length))
        separators, text_starts, text_stops = separators[first:stop], text_starts[first:stop], text_stops[first:stop]
        text = self._text_of(
            np.maximum(text_starts, text_starts - separators - 1),
            np.minimum(text_stops, text_starts - separators - 1 + length),
        )
        is_text = np.ones(length, dtype=np.bool_)
        is_text[separators[separators >= 0]] = False
        tokens = np.full(length, END_OF_TEXT, dtype=np.uint16)
        tokens[is_text] = text
        return tokens

    def _text_of(self, starts: CountArray, stops: CountArray) -> npt.NDArray[np.integer[Any]]:
        """Return the tokens of documents with these starts and stops, without ``END_OF_TEXT`` between them."""
        begin, end = int(starts[0]), int(stops[-1])
        text = self._text[begin:end]
        require_in_vocabulary(text, self._vocab_size, self._path)
        gaps = stops[:-1][stops[:-1] < starts[1:]]
        return np.delete(text, gaps - begin)

    def _documents(self) -> tuple[CountArray, CountArray]:
        """Return the start and stop of each document's text in the file, int64 of shape (documents,)."""
        boundaries = self._index.text_starts(self._first, self._first + BLOCK_DOCUMENTS + 1)
        starts, ends = boundaries[:-1], boundaries[1:]
        is_separated = np.zeros(starts.size, dtype=np.bool_)
        holds_tokens = ends > starts
        is_separated[holds_tokens] = self._text[ends[holds_tokens] - 1] == END_OF_TEXT
        return starts, ends - is_separated


@dataclass(frozen=True)
class _Index:
    """A memory-mapped index that was checked. Its sequences follow each other without gaps."""

    dtype: np.dtype[Any]  # the dtype of the tokens, uint16 or int32
    tokens: int
    documents: int
    pointers: CountArray
    boundaries: CountArray

    def text_starts(self, first: int, stop: int) -> CountArray:
        """Return the position of the first token of each document from ``first`` to ``stop - 1``, int64.

        ``stop`` can be ``documents + 1``. The last position is then the number of tokens.
        """
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
    """Return the number of tokens. Raise DataError if sequences overlap or have gaps between them."""
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


def tokens_file_of(index: Path) -> Path:
    """Return the path of the token file (``.bin``) of an index (``.idx``)."""
    return index.with_suffix(".bin")


def _lengths(text_starts: CountArray, text_stops: CountArray) -> CountArray:
    """Return the number of tokens of each document, including one ``END_OF_TEXT``."""
    return text_stops - text_starts + 1
