"""Find repeated documents. A repeated document equals an earlier document of the source."""

import io
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from data_tools.arrays import CountArray
from data_tools.corpus.chunks import Chunk
from data_tools.storage.folders import Folder

#: About this many fingerprints are sorted together. This takes 250 MB of memory.
_DOCUMENTS_AT_A_TIME = 4 << 20


def write_repeated(folder: Folder, chunks: Sequence[Chunk]) -> None:
    """Write the positions of each chunk's repeated documents to ``chunk.repeated_file``.

    Every chunk must have a ``fingerprints_file``.
    """
    fingerprints = [np.load(io.BytesIO(folder.read(chunk.fingerprints_file)), allow_pickle=False) for chunk in chunks]
    repeated = _find_repeated(np.concatenate([np.empty((0, 2), np.uint64), *fingerprints]))
    start = 0
    for chunk, rows in zip(chunks, fingerprints, strict=True):
        stop = start + len(rows)
        first, last = np.searchsorted(repeated, (start, stop))
        buffer = io.BytesIO()
        np.save(buffer, repeated[first:last] - start)
        folder.write(chunk.repeated_file, buffer.getvalue())
        start = stop


def _find_repeated(fingerprints: npt.NDArray[np.uint64]) -> CountArray:
    """Return the positions of rows that equal an earlier row, in ascending order.

    To limit memory, rows are sorted in groups. Equal rows are in the same group.
    """
    groups = 1 + len(fingerprints) // _DOCUMENTS_AT_A_TIME
    group_of = fingerprints[:, 0] % np.uint64(groups)
    found = [np.empty(0, dtype=np.int64)]
    for group in range(groups):
        positions = np.flatnonzero(group_of == group)
        rows = fingerprints[positions]
        order = np.lexsort((rows[:, 1], rows[:, 0]))  # a stable sort, so the first of equal rows stays first
        equals_previous = (rows[order[1:]] == rows[order[:-1]]).all(axis=1)
        found.append(positions[order[1:][equals_previous]])
    return np.sort(np.concatenate(found))
