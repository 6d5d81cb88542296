"""Find NaN and infinite values in weights and optimizer state."""

import torch
from torch import Tensor


def describe_not_finite(tensor: Tensor) -> str | None:
    """Return a text such as ``3 of 768 numbers are NaN or infinite``, or None if all elements are finite.

    A value that is too large for fp32 counts as infinite.
    """
    if tensor.numel() == 0:
        return None
    # The minimum and the maximum are NaN if any element is NaN. Computing them needs no temporary tensor.
    if all(extreme.float().isfinite() for extreme in torch.aminmax(tensor)):
        return None
    count = int((~tensor.float().isfinite()).sum())
    return f"{count} of {tensor.numel()} numbers are NaN or infinite"
