"""Linear layers of a few rows on a CPU, as in generation: bound by reading the weights, once for all rows.

torch's own matrix products read them at half of what memory gives, and those of some rows slower still; a loop
compiled for the very sizes comes near it. docs/generation.md has the figures.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

# Beyond them torch's products are faster; those in bf16 have instructions of their own.
MOST_ROWS = {torch.float32: 4, torch.bfloat16: 1}

MOST_SHAPES = 64  # beyond them nothing more is compiled


class FewRowLinear(nn.Module):
    """Computes what a linear layer computes, with its parameters."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight = linear.weight
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        rows = x.shape[:-1].numel()
        if rows > MOST_ROWS.get(x.dtype, 0):
            return F.linear(x, self.weight, self.bias)
        y: Tensor = compiled_product()(x.reshape(rows, -1), self.weight, self.bias)
        return y.view(*x.shape[:-1], -1)


def use_few_row_products(model: nn.Module) -> None:
    """Put ``FewRowLinear`` in the place of every linear layer; names and parameters stay."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.Linear):
                setattr(module, name, FewRowLinear(child))


@functools.cache
def compiled_product() -> Callable[[Tensor, Tensor, Tensor | None], Tensor]:
    """(rows, in), weight (out, in), bias (out) or None -> (rows, out); compiled when it first meets these sizes."""
    # A model has five shapes for each number of rows; torch's limit is meant for functions that should have one.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, MOST_SHAPES)
    return torch.compile(_few_row_product, dynamic=False)


def _few_row_product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """(rows, in) -> (rows, out); sums in fp32. The rows are the inner loop: a weight is read once for all."""
    if not torch.compiler.is_compiling():
        return F.linear(x, weight, bias)  # the compiler has given up: too many shapes in one process
    y = (weight.float()[:, None] * x.float()).sum(-1).t()
    return (y if bias is None else y + bias.float()).to(x.dtype)
