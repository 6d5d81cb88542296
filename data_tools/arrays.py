"""The array types that stages exchange."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

# Token ids. GPT-2's 50,257 fit into 16 bits.
TokenArray = npt.NDArray[np.uint16]
# Which tokens are scored.
MaskArray = npt.NDArray[np.bool_]
# Numbers of things, and positions.
CountArray = npt.NDArray[np.int64]


def as_arrow(values: npt.NDArray[Any]) -> pa.Array:
    """The same memory as an Arrow array without nulls; ``values`` of shape (n,), contiguous, of whole numbers.

    ``pa.array`` does the same, and imports pandas first, which takes longer than starting the program.
    """
    return pa.Array.from_buffers(pa.from_numpy_dtype(values.dtype), values.size, [None, pa.py_buffer(values)])


def from_arrow(array: pa.Array, dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    """The same memory as a numpy array, (n,), read-only; ``array.to_numpy`` would import pandas too.

    Raises:
        ValueError: it has nulls.
    """
    if array.null_count:
        raise ValueError("it has nulls")
    return np.frombuffer(array.buffers()[1], dtype=dtype)[array.offset : array.offset + len(array)]
