"""Which documents of a corpus have an equal one before them, from fingerprints that chunks wrote."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from data_tools.arrays import CountArray
from data_tools.corpus.chunks import Chunk
from data_tools.corpus.output import fingerprints_name, repeated_name
from data_tools.storage.folders import Folder

#: Documents whose fingerprints are compared at a time: a quarter of a gigabyte with all that sorting needs.
_DOCUMENTS_AT_A_TIME = 4 << 20

Fingerprints = npt.NDArray[np.uint64]


def write_repeated(folder: Folder, chunks: Sequence[Chunk]) -> None:
    """Write down, for each chunk, the numbers of its documents that came before, in it or in an earlier chunk.

    The first of equal documents stays, in the order of the source. Memory is bounded: fingerprints are compared in
    groups of equal leading bits.
    """
    fingerprints = [_load(folder, chunk) for chunk in chunks]
    owner = np.repeat(np.arange(len(chunks)), [len(part) for part in fingerprints])
    number = np.concatenate([np.arange(len(part)) for part in fingerprints]) if chunks else np.empty(0, np.int64)
    repeated = _find_repeated(np.concatenate(fingerprints) if chunks else np.empty((0, 2), np.uint64))
    for index, chunk in enumerate(chunks):
        buffer = io.BytesIO()
        np.save(buffer, number[repeated[owner[repeated] == index]])
        folder.write(repeated_name(chunk), buffer.getvalue())


def _load(folder: Folder, chunk: Chunk) -> Fingerprints:
    loaded: Fingerprints = np.load(io.BytesIO(folder.read(fingerprints_name(chunk))), allow_pickle=False)
    return loaded


def _find_repeated(fingerprints: Fingerprints) -> CountArray:
    """Sorted positions of rows that have an equal row before them; int64."""
    groups = 1 + len(fingerprints) // _DOCUMENTS_AT_A_TIME
    group_of = fingerprints[:, 0] % np.uint64(groups)
    found = [np.empty(0, dtype=np.int64)]
    for group in range(groups):
        positions = np.flatnonzero(group_of == group)
        rows = fingerprints[positions]
        order = np.lexsort((rows[:, 1], rows[:, 0]))  # stable: of equal rows the first comes first
        like_the_one_before = (rows[order[1:]] == rows[order[:-1]]).all(axis=1)
        found.append(positions[order[1:][like_the_one_before]])
    return np.sort(np.concatenate(found))
