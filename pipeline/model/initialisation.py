"""Draw the initial weights. A rank can draw any range of a parameter, and gets the same values as any other rank."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from pipeline.config.schema import ModelConfig
from pipeline.seeds import derive_seed

INIT_STD = 0.02

#: The number of random values in memory at a time. torch draws normal values in groups of 16, so a multiple of 16 gives
#: the same values as a single call for the whole parameter.
BLOCK_ELEMENTS = 1 << 18


def draw_elements(name: str, shape: torch.Size, config: ModelConfig, seed: int, start: int, target: Tensor) -> None:
    """Set a range of one parameter to its initial values. Each parameter has its own random generator.

    Weights are normally distributed with standard deviation 0.02. For weights whose output is added to the residual
    stream, the standard deviation is 0.02/sqrt(2 n_layer) (Radford et al. 2019, section 2.3). Biases are 0, and
    LayerNorm weights are 1.

    The values do not depend on how a parameter is divided into ranges. A random generator cannot skip values.
    Therefore, the function draws all values of the parameter up to the end of the range. It keeps at most ``2 *
    BLOCK_ELEMENTS`` of them in memory.

    Args:
        name: the canonical name of the parameter.
        shape: the shape of the whole parameter.
        start: the index of the range's first element in the flattened parameter.
        target: the tensor to fill, shape (n,), fp32, on any device.
    """
    if name.endswith("bias"):
        target.zero_()
        return
    if "ln_" in name:
        target.fill_(1.0)
        return
    std = INIT_STD / math.sqrt(2 * config.n_layer) if name.endswith("c_proj.weight") else INIT_STD
    generator = torch.Generator().manual_seed(derive_seed(seed, "weights", name))
    stop = start + len(target)
    assert stop <= shape.numel(), f"{name} has {shape.numel()} elements, and the range ends at {stop}"
    for first, block in _normal_blocks(shape.numel(), stop, std, generator):
        low, high = max(first, start), min(first + len(block), stop)
        if low < high:
            target[low - start : high - start].copy_(block[low - first : high - first])
    if name == "wte.weight":  # the padding rows are zero, so that they do not change any norm
        target[max(0, config.vocab_size * config.n_embd - start) :].zero_()


def _normal_blocks(count: int, stop: int, std: float, generator: torch.Generator) -> Iterator[tuple[int, Tensor]]:
    """Yield the values of a parameter with ``count`` elements in blocks, until element ``stop`` is reached.

    Each block is yielded with the index of its first element, and is valid until the next block is drawn. The last
    block of a parameter is not shorter than the other blocks, because torch draws fewer than 16 values differently.
    """
    values = torch.empty(min(count, 2 * BLOCK_ELEMENTS))
    first = 0
    while first < stop:
        end = count if count - first < 2 * BLOCK_ELEMENTS else first + BLOCK_ELEMENTS
        yield first, values[: end - first].normal_(0.0, std, generator=generator)
        first = end
