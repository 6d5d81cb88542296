"""Define array types for all stages, and convert arrays to Arrow."""

from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

TokenArray = npt.NDArray[np.uint16]  # token ids; GPT-2's 50,257 fit into 16 bits
MaskArray = npt.NDArray[np.bool_]  # which tokens are scored
CountArray = npt.NDArray[np.int64]  # counts and positions


def as_arrow(values: npt.NDArray[Any]) -> pa.Array:
    """Return a contiguous integer array of shape (n,) as an Arrow array, without a copy.

    ``pa.array`` would import pandas, which is slow.
    """
    return pa.Array.from_buffers(pa.from_numpy_dtype(values.dtype), values.size, [None, pa.py_buffer(values)])
