"""Define linear layers for fast inference on a CPU. Their weights are stored in the memory layout of oneDNN.

During generation, the input of a linear layer has few rows. With such inputs, torch's own linear layers use only half
of the memory bandwidth. See docs/benchmarks.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from pipeline.model.gpt2 import GPT2
from pipeline.model.output_layer import OutputLayer

# oneDNN reads fp32 weights faster in a product of four rows than in a product of one to three rows.
FEWEST_ROWS = {torch.float32: 4, torch.bfloat16: 1}


class PackedLinear(nn.Module):
    """A linear layer for inference, which computes in a given dtype.

    Its weight is packed, which means stored in the memory layout of oneDNN. The weight gets no gradient.
    """

    def __init__(self, linear: nn.Linear, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        self.weight: Tensor = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach().to(dtype))
        self.bias = None if linear.bias is None else linear.bias.detach().to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Return the output of the layer, shape (..., out), in the dtype of the layer.

        Args:
            x: shape (..., in), in any dtype.
        """
        rows = x.shape[:-1].numel()
        missing = FEWEST_ROWS[self.dtype] - rows
        if missing <= 0:
            return self.product(x.to(self.dtype))
        y = self.product(F.pad(x.reshape(rows, -1).to(self.dtype), (0, 0, 0, missing)))
        return y[:rows].view(*x.shape[:-1], y.shape[-1])

    def product(self, x: Tensor) -> Tensor:
        """Return the output of the layer, shape (rows, out).

        Args:
            x: shape (rows, in), in the dtype of the layer.
        """
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        return y


def pack_linear_layers(model: GPT2, dtype: torch.dtype) -> None:
    """Replace the linear layers of a model by packed layers. Call this function before inference on a CPU.

    If the model is on a GPU, or if oneDNN does not support the dtype on this CPU, nothing changes.

    The original weights in the blocks are freed. The original weight of the output layer is kept, because the token
    embedding uses the same weight.
    """
    if model.wte.weight.device.type != "cpu" or not can_pack(dtype):
        return
    model.lm_head.packed_product = PackedLinear(model.lm_head, dtype)
    # The list must not contain the linear layers. Otherwise all their weights would stay in memory until the end.
    for module in [module for module in model.modules() if not isinstance(module, nn.Linear)]:
        for name, child in module.named_children():
            if isinstance(child, nn.Linear) and not isinstance(child, OutputLayer):
                setattr(module, name, PackedLinear(child, dtype))


def can_pack(dtype: torch.dtype) -> bool:
    """Return whether the installed torch and this CPU support ``PackedLinear`` in a dtype."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return dtype == torch.float32
