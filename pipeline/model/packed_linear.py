"""Define linear layers for fast inference on a CPU.

In generation, a matrix product takes about as long as reading its weight from memory. Which library reads fastest, and
from which layout, depends on the CPU and on the number of rows of the input. This module measures several ways, and
stores each weight for the fastest one.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from pipeline.model.gpt2 import GPT2, GeluLinear

Activation = Callable[[Tensor], Tensor]

#: On some CPUs, an input with fewer rows needs a special treatment to read the weight at full speed.
FEW_ROWS = 4
ROUNDS = 5
CAREFUL_ROUNDS = 3  # measure every way. The first of them warms up, and is hardly ever the shortest.
MEASURED_BYTES = 50e6  # of the blocks. On most CPUs, these weights are larger than the caches.
MEASURED_OUTPUTS = 4096  # of the output layer
SLOW = 1.5  # a way that takes this many times as long as the fastest one is measured only in these rounds
LEAST_GAIN = 0.05  # the least share of time that another way must save to replace the usual way

#: How a weight is stored: as in ``nn.Linear``, transposed as in OpenAI's GPT-2, or in the layout of oneDNN.
Layout = Literal["plain", "transposed", "packed"]
#: What happens to an input with fewer than ``FEW_ROWS`` rows:
#:
#: - ``filled``: further rows fill it up to ``FEW_ROWS`` rows. On some CPUs, oneDNN then reads fp32 weights faster.
#: - ``split``: each thread computes the product of one range of columns. On some CPUs, the library of torch uses only
#:   one thread for one row. One core cannot read at the full speed of the memory.
Treatment = Literal["none", "filled", "split"]


@dataclass(frozen=True)
class Way:
    """A method of computing a linear layer. All methods compute the same function."""

    layout: Layout
    few_rows: Treatment = "none"  # "filled" requires the layout "packed", and "split" the layout "transposed"

    def store(self, weight: Tensor) -> Tensor:
        """Return the weight, shape (out, in), in the layout that ``product`` needs."""
        if self.layout == "packed":
            return torch.ops.mkldnn._reorder_linear_weight(weight)
        return weight.t().contiguous().t() if self.layout == "transposed" else weight

    def product(self, x: Tensor, stored: Tensor, bias: Tensor | None, with_gelu: bool = False) -> Tensor:
        """Return x W^T + b, or its GELU, shape (..., out). GELU is the approximation with tanh.

        Args:
            x: shape (..., in), in the dtype of the weight. If ``few_rows`` is ``filled``, at least ``FEW_ROWS`` rows.
            stored: the result of ``store``.
        """
        if self.layout == "packed":
            y: Tensor = torch.ops.mkldnn._linear_pointwise(x, stored, bias, "gelu" if with_gelu else "none", [], "tanh")
            return y
        if self.few_rows == "split" and x.shape[:-1].numel() < FEW_ROWS:
            y = split_linear(x, stored, bias)
        else:
            y = F.linear(x, stored, bias)
        return F.gelu(y, approximate="tanh") if with_gelu else y


def split_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Compute ``F.linear`` as a sum over ranges of the columns of ``x``, one range per thread.

    Args:
        weight: shape (out, in), stored by columns.
    """
    out, width = weight.shape
    count = _number_of_ranges(width, torch.get_num_threads())
    ranges = x.reshape(-1, count, width // count).transpose(0, 1)  # (count, rows, in / count)
    y = torch.bmm(ranges, weight.t().view(count, width // count, out)).sum(0)  # (rows, out)
    return (y if bias is None else y.add_(bias)).view(*x.shape[:-1], out)


@cache
def _number_of_ranges(width: int, threads: int) -> int:
    """Return the largest number of equal ranges of ``width`` columns that is at most the number of threads."""
    return max(count for count in range(1, threads + 1) if width % count == 0)


#: The ways to measure per dtype. The first one is used unless another one is clearly faster: in the measurement,
#: ``packed`` and ``filled`` often take the same time, but in generation ``filled`` is faster on some CPUs. bf16 has
#: only one way, because ways round bf16 differently: a repeated command could then generate another text.
WAYS = {
    torch.float32: (
        Way("packed", "filled"),
        Way("packed"),
        Way("transposed", "split"),
        Way("transposed"),
        Way("plain"),
    ),
    torch.bfloat16: (Way("packed"),),
}


class InferenceLinear(nn.Module):
    """A linear layer for inference, followed by an activation. It converts each input to the dtype of its weight.

    The weight gets no gradient.

    Args:
        weight: the result of ``way.store``.
        activation: computes the output from the linear layer's output. If it computes GELU, oneDNN computes both.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, way: Way, activation: Activation | None = None) -> None:
        super().__init__()
        self.weight = weight
        self.bias = bias
        self.way = way
        self.with_gelu = activation is not None and _is_gelu(activation)
        self.activation = None if self.with_gelu else activation

    def forward(self, x: Tensor) -> Tensor:
        """Return the output, shape (..., out), in the dtype of the layer. The input can have any dtype."""
        x = x.to(self.weight.dtype)
        rows = x.shape[:-1].numel()
        if self.way.few_rows == "filled" and rows < FEW_ROWS:
            filled = F.pad(x.reshape(rows, -1), (0, 0, 0, FEW_ROWS - rows))
            y = self.way.product(filled, self.weight, self.bias, self.with_gelu)
            y = y[:rows].view(*x.shape[:-1], -1)
        else:
            y = self.way.product(x, self.weight, self.bias, self.with_gelu)
        return y if self.activation is None else self.activation(y)


def _is_gelu(activation: Activation) -> bool:
    """Return whether a function computes the approximation of GELU with tanh. Compares values, not names."""
    x = torch.linspace(-4, 4, 33)
    return torch.allclose(activation(x), F.gelu(x, approximate="tanh"))


def inference_linear(linear: nn.Linear, dtype: torch.dtype, way: Way) -> InferenceLinear:
    """Return a layer that computes the same as an ``nn.Linear`` or a ``GeluLinear``."""
    bias = None if linear.bias is None else linear.bias.detach().to(dtype)
    activation = linear.activation if isinstance(linear, GeluLinear) else None
    return InferenceLinear(way.store(linear.weight.detach().to(dtype)), bias, way, activation)


def pack_linear_layers(model: GPT2, dtype: torch.dtype, rows: int | None = None) -> None:
    """Replace the linear layers of a model by layers for fast inference on a CPU.

    The model does not change if it is on a GPU, or if oneDNN does not support the dtype on this CPU.

    Args:
        rows: the number of rows in most inputs. The ways are measured with this number, and each layer uses the
            fastest ``Way``. If None, each layer uses oneDNN's layout. The rounding is then the same in each call.
    """
    if model.wte.weight.device.type != "cpu" or not can_pack(dtype):
        return
    usual = dict.fromkeys(map(_shape, linear_layers(model)), Way("packed"))
    ways = usual if rows is None or len(WAYS[dtype]) == 1 else fastest_ways(model, dtype, rows)
    model.lm_head.packed_product = inference_linear(model.lm_head, dtype, ways[_shape(model.lm_head)])
    # A list of the linear layers would keep all their weights in memory.
    for module in [module for module in model.modules() if not isinstance(module, nn.Linear)]:
        for name, child in module.named_children():
            # A subclass may compute something else.
            if isinstance(child, nn.Linear) and type(child) in (nn.Linear, GeluLinear):
                setattr(module, name, inference_linear(child, dtype, ways[_shape(child)]))


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
    """Time the ways of computing linear layers. Return the fastest way for each weight shape (out, in).

    The ways take turns, so that a slow moment affects all of them. For each layout, copies of some blocks and of some
    rows of the output layer are in memory. The blocks have at least ``MEASURED_BYTES``.

    Args:
        rows: the number of rows of the measured inputs.
    """
    layers = _measured_layers(model)
    shapes = [_shape(layer) for layer in (*layers, model.lm_head)]
    weights = [layer.weight.detach().to(dtype) for layer in layers]
    weights.append(model.lm_head.weight[:MEASURED_OUTPUTS].detach().to(dtype))
    inputs = [torch.ones(rows, weight.shape[1], dtype=dtype) for weight in weights]
    ways = [way for way in WAYS[dtype] if way.few_rows == "none" or rows < FEW_ROWS]
    layouts = {way.layout for way in ways}
    stored = {layout: [Way(layout).store(weight) for weight in weights] for layout in layouts}
    candidates = {way: [InferenceLinear(weight, None, way) for weight in stored[way.layout]] for way in ways}
    shortest_s: dict[tuple[int, int], dict[Way, float]] = {shape: {} for shape in shapes}
    for finished_rounds in range(ROUNDS):
        for way, own_layers in candidates.items():
            for shape, layer, x in zip(shapes, own_layers, inputs, strict=True):
                found = shortest_s[shape]
                if finished_rounds >= CAREFUL_ROUNDS and found[way] > SLOW * min(found.values()):
                    continue
                start = time.perf_counter()
                layer(x)
                elapsed_s = time.perf_counter() - start
                found[way] = min(elapsed_s, found.get(way, elapsed_s))
    return {shape: _choose(found) for shape, found in shortest_s.items()}


def _measured_layers(model: GPT2) -> list[nn.Linear]:
    block_bytes = sum(weight.nbytes for weight in model.h[0].parameters())
    return linear_layers(model.h[: math.ceil(MEASURED_BYTES / block_bytes)])


def _choose(seconds: dict[Way, float]) -> Way:
    """Return the fastest way, or the first one if no other way is clearly faster."""
    usual = next(iter(seconds))
    fastest = min(seconds, key=seconds.__getitem__)
    return fastest if seconds[fastest] <= (1 - LEAST_GAIN) * seconds[usual] else usual


def linear_layers(module: nn.Module) -> list[nn.Linear]:
    return [layer for layer in module.modules() if isinstance(layer, nn.Linear)]


def _shape(layer: nn.Linear) -> tuple[int, int]:
    return (layer.out_features, layer.in_features)
