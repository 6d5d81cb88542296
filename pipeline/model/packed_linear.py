"""Linear layers for a model on a CPU that trains no more: weights laid out once as oneDNN's products read them.

torch's own products find weights as the checkpoint has them, and read them at half of what memory gives when the rows
are few, as in generation; docs/benchmarks has the figures.
"""

from __future__ import annotations

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from pipeline.model.gpt2 import GPT2
from pipeline.model.output_layer import OutputLayer

# oneDNN's product of four rows reads fp32 weights faster than those of one to three rows do.
FEWEST_ROWS = {torch.float32: 4, torch.bfloat16: 1}


class PackedLinear(nn.Module):
    """What a linear layer computes, in one dtype; without parameters, and without a backward pass."""

    def __init__(self, linear: nn.Linear, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        self.weight = _packed(linear.weight.detach().to(dtype))
        self.bias = None if linear.bias is None else linear.bias.detach().to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) in any dtype -> (..., out) in the layer's own, as under autocast."""
        rows = x.shape[:-1].numel()
        missing = FEWEST_ROWS[self.dtype] - rows
        if missing <= 0:
            return self.product(x.to(self.dtype))
        y = self.product(F.pad(x.reshape(rows, -1).to(self.dtype), (0, 0, 0, missing)))
        return y[:rows].view(*x.shape[:-1], y.shape[-1])

    def product(self, x: Tensor) -> Tensor:
        """The same of rows as they are, in the layer's dtype."""
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        return y


def pack_linear_layers(model: GPT2, dtype: torch.dtype) -> None:
    """Replace the linear layers, one by one, of a model on a CPU whose oneDNN has products in this dtype.

    Any other model stays as it is. The weights of the blocks are freed. That of the output layer stays beside its
    packed copy: it is the embedding.
    """
    if model.wte.weight.device.type != "cpu" or not can_pack(dtype):
        return
    model.lm_head.packed_product = PackedLinear(model.lm_head, dtype)
    # Without the layers themselves: a list that held them would keep all their weights until the end.
    for module in [module for module in model.modules() if not isinstance(module, nn.Linear)]:
        for name, child in module.named_children():
            if isinstance(child, nn.Linear) and not isinstance(child, OutputLayer):
                setattr(module, name, PackedLinear(child, dtype))


def can_pack(dtype: torch.dtype) -> bool:
    """Whether this torch has packed products, and this CPU the instructions for them."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    operators = torch.ops.mkldnn
    if not hasattr(operators, "_linear_pointwise"):
        return False
    if dtype == torch.bfloat16:
        return bool(operators._is_mkldnn_bf16_supported())
    return dtype == torch.float32


def _packed(weight: Tensor) -> Tensor:
    """(out, in) -> the same in oneDNN's layout, which is its own for each processor."""
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight)
    return packed
