"""The array types that stages exchange."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

# Token ids. GPT-2's 50,257 fit into 16 bits.
TokenArray = npt.NDArray[np.uint16]
# Which tokens are scored.
MaskArray = npt.NDArray[np.bool_]
# Numbers of things, and positions.
CountArray = npt.NDArray[np.int64]
