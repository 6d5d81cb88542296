"""Find weights and moments that are NaN or infinite."""

import torch
from torch import Tensor


def describe_not_finite(tensor: Tensor) -> str | None:
    """Return how many elements are NaN or infinite in fp32, such as ``3 of 768 numbers are NaN or infinite``.

    Returns None if all elements are finite.
    """
    if tensor.numel() == 0:
        return None
    # The two extremes are NaN if any element is, and computing them needs no memory of the tensor's size.
    if all(extreme.float().isfinite() for extreme in torch.aminmax(tensor)):
        return None
    count = int((~tensor.float().isfinite()).sum())
    return f"{count} of {tensor.numel()} numbers are NaN or infinite"
