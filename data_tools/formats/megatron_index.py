"""The index of Megatron-LM's and gpt-neox's data sets, ``X.idx``: where each sequence and document of ``X.bin`` begins.

As their ``MMapIndexedDataset`` writes it, little-endian: magic, version (uint64), type of the tokens (uint8), number of
sequences, number of document boundaries (uint64 each); then the sequences' sizes in tokens (int32), where they begin
in ``X.bin`` in bytes (int64), and the document boundaries as numbers of sequences (int64; the first is 0, the last the
number of sequences).
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from data_tools.arrays import CountArray
from data_tools.errors import DataError
from data_tools.formats.mapping import map_whole

INDEX_SUFFIX = ".idx"
MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
_OLDER_MAGIC = b"TNTIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
_DTYPES: dict[int, np.dtype[Any]] = {4: np.dtype("<i4"), 8: np.dtype("<u2")}
_REFUSED_DTYPES = {1: "uint8", 2: "int8", 3: "int16", 5: "int64", 6: "floating point", 7: "floating point"}
# Numbers that are checked in one go, so that memory does not grow with the index.
_BLOCK = 1 << 18


@dataclass(frozen=True)
class MegatronIndex:
    """An index, mapped, that was checked from end to end: sequences follow each other without gaps.

    Attributes:
        dtype: of the tokens, uint16 or int32.
        tokens, documents: how many the data set has.
    """

    dtype: np.dtype[Any]
    tokens: int
    documents: int
    _pointers: CountArray
    _boundaries: CountArray

    def text_starts(self, first: int, stop: int) -> CountArray:
        """Where documents ``first`` to ``stop`` begin in the tokens, int64; one past the last is the end."""
        sequences = self._boundaries[first:stop]
        starts = np.full(sequences.size, self.tokens, dtype=np.int64)
        is_sequence = sequences < self._pointers.size
        starts[is_sequence] = self._pointers[sequences[is_sequence]] // self.dtype.itemsize
        return starts


def is_index(path: Path) -> bool:
    """Whether a file begins as an index, be it of this format or of the older one.

    Raises:
        OSError: it cannot be read.
    """
    with open(path, "rb") as file:
        return file.read(len(MAGIC)).startswith((MAGIC, _OLDER_MAGIC))


def read_index(path: Path) -> MegatronIndex:
    """Map an index and check all of it.

    Raises:
        DataError: it is damaged, of another version, or of tokens of another type.
    """
    content = map_whole(path)
    if content.size < _HEADER.size:
        raise DataError(f"{path} is no whole index: it ends after {content.size} bytes, within its header")
    magic, version, code, sequences, boundaries = _HEADER.unpack(memoryview(content)[: _HEADER.size])
    _expect_header(path, magic, version, code)
    size = _HEADER.size + sequences * (4 + 8) + boundaries * 8
    if content.size != size:
        raise DataError(
            f"{path} is no whole index: {sequences} sequences and {boundaries} document boundaries "
            f"take {size} bytes, it has {content.size}"
        )
    sizes = np.frombuffer(content, "<i4", sequences, _HEADER.size)
    pointers = np.frombuffer(content, "<i8", sequences, _HEADER.size + sequences * 4)
    document_boundaries = np.frombuffer(content, "<i8", boundaries, size - boundaries * 8)
    dtype = _DTYPES[code]
    tokens = _count_tokens(path, sizes, pointers, dtype.itemsize)
    _expect_boundaries(path, document_boundaries, sequences)
    return MegatronIndex(dtype, tokens, boundaries - 1, pointers, document_boundaries)


def _expect_header(path: Path, magic: bytes, version: int, code: int) -> None:
    if magic.startswith(_OLDER_MAGIC):
        raise DataError(
            f"{path} is an index of the older kind (cached, lazy); preprocess again with --dataset-impl mmap"
        )
    if magic != MAGIC:
        raise DataError(f"{path} is no index of Megatron: its magic is {magic!r}, it must be {MAGIC!r}")
    if version != VERSION:
        raise DataError(f"{path}: its version is {version}, it must be {VERSION}")
    if code not in _DTYPES:
        kind = _REFUSED_DTYPES.get(code, "unknown")
        raise DataError(f"{path}: its tokens are of type {code} ({kind}), they must be of 8 (uint16) or 4 (int32)")


def _count_tokens(path: Path, sizes: npt.NDArray[np.int32], pointers: CountArray, token_bytes: int) -> int:
    """All tokens; each sequence must begin where the one before it ends."""
    total_bytes = 0
    for first in range(0, sizes.size, _BLOCK):
        block = sizes[first : first + _BLOCK].astype(np.int64)
        if (block < 0).any():
            at = int(np.argmax(block < 0))
            raise DataError(f"{path}: sequence {first + at} has the size {block[at]}, it must be 0 or more")
        ends = total_bytes + np.cumsum(block * token_bytes)
        starts = ends - block * token_bytes
        wrong = pointers[first : first + _BLOCK] != starts
        if wrong.any():
            at = int(np.argmax(wrong))
            raise DataError(
                f"{path}: sequence {first + at} is said to begin at byte {pointers[first + at]}, "
                f"those before it end at byte {starts[at]}"
            )
        total_bytes = int(ends[-1])
    return total_bytes // token_bytes


def _expect_boundaries(path: Path, boundaries: CountArray, sequences: int) -> None:
    if boundaries.size == 0 or boundaries[0] != 0 or boundaries[-1] != sequences:
        ends = f"from {boundaries[0]} to {boundaries[-1]}" if boundaries.size else "none at all"
        raise DataError(f"{path}: its document boundaries must go from 0 to {sequences}, they are {ends}")
    for first in range(0, boundaries.size - 1, _BLOCK):
        backwards = np.diff(boundaries[first : first + _BLOCK + 1]) < 0
        if backwards.any():
            raise DataError(f"{path}: document {first + int(np.argmax(backwards))} ends before it begins")
