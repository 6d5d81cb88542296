"""Draw the initial weights. Any rank can draw any range of a parameter, and all ranks get the same values."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from pipeline.config.schema import ModelConfig
from pipeline.seeds import derive_seed

INIT_STD = 0.02

#: The number of values to draw at a time. It is a multiple of 16, because torch draws normal values in groups of 16.
BLOCK_ELEMENTS = 1 << 18


def draw_elements(name: str, shape: torch.Size, config: ModelConfig, seed: int, start: int, target: Tensor) -> None:
    """Set a range of one parameter to its initial values.

    Weights are normally distributed with standard deviation 0.02. For weights whose output is added to the residual
    stream, the standard deviation is 0.02/sqrt(2 n_layer) (Radford et al. 2019, section 2.3). Biases are 0, and other
    weights with one dimension, such as those of LayerNorm, are 1.

    All values before the range are also drawn, because a random generator cannot skip values.

    Args:
        shape: the shape of the whole parameter.
        start: the index of the range's first element in the flattened parameter.
        target: the tensor to fill, fp32 of shape (n,), on any device.
    """
    if name.endswith("bias"):
        target.zero_()
        return
    if len(shape) == 1:
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
    """Yield (index of the first value, values) for blocks of a parameter, until element ``stop`` is reached.

    Each block overwrites the previous block. The last block is never short, because torch draws fewer than 16 values in
    another way.
    """
    values = torch.empty(min(count, 2 * BLOCK_ELEMENTS))
    first = 0
    while first < stop:
        end = count if count - first < 2 * BLOCK_ELEMENTS else first + BLOCK_ELEMENTS
        yield first, values[: end - first].normal_(0.0, std, generator=generator)
        first = end
