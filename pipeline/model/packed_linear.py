"""Define linear layers for fast inference on a CPU.

In generation, a matrix product takes about as long as reading its weight from memory. torch reads weights faster on
some CPUs, and oneDNN on others. This module measures both, and stores each weight for the faster library.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from pipeline.model.gpt2 import GPT2, GeluLinear, gelu

#: An input with fewer rows can be filled up to this number. On some CPUs, oneDNN reads fp32 weights faster for four
#: rows than for one to three rows.
FILLED_ROWS = 4
ROUNDS = 5
MEASURED_BLOCKS = 2  # enough that the weights do not stay in the caches of the CPU
MEASURED_OUTPUTS = 8192  # of the output layer
LEAST_GAIN = 0.05  # the least share of time that another way must save to replace the usual way


@dataclass(frozen=True)
class Way:
    """A method of computing a linear layer. All methods compute the same function."""

    is_packed: bool  # whether the weight is stored in the layout of oneDNN
    fewest_rows: int = 1  # an input with fewer rows is filled up with rows of zeros

    def store(self, weight: Tensor) -> Tensor:
        """Return the weight, shape (out, in), in the layout that ``product`` needs."""
        return torch.ops.mkldnn._reorder_linear_weight(weight) if self.is_packed else weight

    def product(self, x: Tensor, stored: Tensor, bias: Tensor | None, with_gelu: bool = False) -> Tensor:
        """Return x W^T + b, or its ``gelu``, shape (..., out).

        Args:
            x: shape (..., in), in the dtype of the weight, with at least ``fewest_rows`` rows.
            stored: the result of ``store``.
        """
        if self.is_packed:
            y: Tensor = torch.ops.mkldnn._linear_pointwise(x, stored, bias, "gelu" if with_gelu else "none", [], "tanh")
            return y
        y = F.linear(x, stored, bias)
        return gelu(y) if with_gelu else y


#: The ways to measure per dtype, the usual way first. bf16 has only one way, because ways round bf16 differently: a
#: repeated command could then generate another text.
WAYS = {
    torch.float32: (Way(is_packed=True), Way(is_packed=True, fewest_rows=FILLED_ROWS), Way(is_packed=False)),
    torch.bfloat16: (Way(is_packed=True),),
}


class InferenceLinear(nn.Module):
    """A linear layer for inference. It converts each input to the dtype of its weight.

    The weight gets no gradient.

    Args:
        with_gelu: whether the layer also computes the ``gelu`` of its output.
    """

    def __init__(self, linear: nn.Linear, dtype: torch.dtype, way: Way, with_gelu: bool = False) -> None:
        super().__init__()
        self.dtype = dtype
        self.way = way
        self.with_gelu = with_gelu
        self.weight = way.store(linear.weight.detach().to(dtype))
        self.bias = None if linear.bias is None else linear.bias.detach().to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Return the output, shape (..., out), in the dtype of the layer. The input can have any dtype."""
        x = x.to(self.dtype)
        rows = x.shape[:-1].numel()
        missing = self.way.fewest_rows - rows
        if missing <= 0:
            return self.way.product(x, self.weight, self.bias, self.with_gelu)
        filled = F.pad(x.reshape(rows, -1), (0, 0, 0, missing))
        y = self.way.product(filled, self.weight, self.bias, self.with_gelu)
        return y[:rows].view(*x.shape[:-1], y.shape[-1])


def pack_linear_layers(model: GPT2, dtype: torch.dtype, rows: int | None = None) -> None:
    """Replace the linear layers of a model by layers for fast inference on a CPU.

    The model does not change if it is on a GPU, or if oneDNN does not support the dtype on this CPU.

    Args:
        rows: the number of rows in most inputs. The ways are measured with this number, and each layer uses the
            fastest ``Way``. If None, each layer uses the first ``Way`` in ``WAYS``. The rounding is then the same in
            each call.
    """
    if model.wte.weight.device.type != "cpu" or not can_pack(dtype):
        return
    usual = dict.fromkeys(map(_shape, linear_layers(model)), WAYS[dtype][0])
    ways = usual if rows is None or len(WAYS[dtype]) == 1 else fastest_ways(model, dtype, rows)
    model.lm_head.packed_product = InferenceLinear(model.lm_head, dtype, ways[_shape(model.lm_head)])
    # A list of the linear layers would keep all their weights in memory.
    for module in [module for module in model.modules() if not isinstance(module, nn.Linear)]:
        for name, child in module.named_children():
            with_gelu = isinstance(child, GeluLinear) and child.activation is gelu
            if isinstance(child, nn.Linear) and (with_gelu or type(child) is nn.Linear):
                setattr(module, name, InferenceLinear(child, dtype, ways[_shape(child)], with_gelu))


def can_pack(dtype: torch.dtype) -> bool:
    """Return whether torch and this CPU support oneDNN's matrix products in a dtype."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return dtype == torch.float32


@torch.inference_mode()
def fastest_ways(model: GPT2, dtype: torch.dtype, rows: int) -> dict[tuple[int, int], Way]:
    """Time each ``Way`` of computing linear layers. Return the fastest way for each weight shape (out, in).

    Args:
        rows: the number of rows of the measured inputs.
    """
    ways = WAYS[dtype]
    layers = linear_layers(model.h[:MEASURED_BLOCKS])
    shapes = [_shape(layer) for layer in (*layers, model.lm_head)]
    weights = [layer.weight.detach().to(dtype) for layer in layers]
    weights.append(model.lm_head.weight[:MEASURED_OUTPUTS].detach().to(dtype))
    seconds = [_measure(way, shapes, weights, rows) for way in ways]
    return {shape: _choose(ways, [found[shape] for found in seconds]) for shape in shapes}


def _measure(
    way: Way, shapes: Sequence[tuple[int, int]], weights: Sequence[Tensor], rows: int
) -> dict[tuple[int, int], float]:
    stored = [way.store(weight) for weight in weights]
    inputs = [torch.ones(max(rows, way.fewest_rows), weight.shape[1], dtype=weight.dtype) for weight in weights]
    shortest: dict[tuple[int, int], float] = {}
    for _ in range(1 + ROUNDS):  # the first round warms up, and is never the shortest
        for shape, x, weight in zip(shapes, inputs, stored, strict=True):
            start = time.perf_counter()
            way.product(x, weight, None)
            elapsed = time.perf_counter() - start
            shortest[shape] = min(elapsed, shortest.get(shape, elapsed))
    return shortest


def _choose(ways: Sequence[Way], seconds: Sequence[float]) -> Way:
    fastest = min(range(len(ways)), key=seconds.__getitem__)
    return ways[fastest] if seconds[fastest] <= (1 - LEAST_GAIN) * seconds[0] else ways[0]


def linear_layers(module: nn.Module) -> list[nn.Linear]:
    return [layer for layer in module.modules() if isinstance(layer, nn.Linear)]


def _shape(layer: nn.Linear) -> tuple[int, int]:
    return (layer.out_features, layer.in_features)
