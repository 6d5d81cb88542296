"""Allocate buffers in host memory, into which tensors are copied. Buffers for tensors on a GPU are pinned.

torch rounds each pinned allocation up to a power of two. With one allocation per tensor, the buffers for GPT-2 would
need up to 1.7 times the size of the tensors. Therefore, several buffers share one allocation, which is called a *slab*.
The size of a slab is a power of two.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_ALIGNMENT = 512  # bytes, as for tensors on a GPU


@dataclass(frozen=True)
class Slab:
    """A pinned allocation that several buffers share."""

    size: int  # bytes, a power of two
    offsets: dict[int, int]  # index of a tensor -> its first byte


def allocate_host_buffers(sources: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return one uninitialized tensor in host memory per source, with the source's shape and dtype.

    If a source is on a GPU, its tensor is pinned.
    """
    on_gpu = {name: source for name, source in sources.items() if source.is_cuda}
    others = {name: source for name, source in sources.items() if name not in on_gpu}
    return {name: torch.empty_like(source, device="cpu") for name, source in others.items()} | _allocate_pinned(on_gpu)


def _allocate_pinned(sources: Mapping[str, Tensor]) -> dict[str, Tensor]:
    names = list(sources)
    buffers: dict[str, Tensor] = {}
    for slab in plan_slabs([source.nbytes for source in sources.values()]):
        memory = torch.empty(slab.size, dtype=torch.uint8, pin_memory=True)
        for index, offset in slab.offsets.items():
            source = sources[names[index]]
            buffers[names[index]] = memory[offset : offset + source.nbytes].view(source.dtype).view(source.shape)
    return buffers


def plan_slabs(sizes: Sequence[int]) -> list[Slab]:
    """Divide buffers among slabs (allocations whose size is a power of two), so that little memory is unused.

    Args:
        sizes: the size of each buffer in bytes.
    """
    padded = [-(-size // _ALIGNMENT) * _ALIGNMENT for size in sizes]
    remaining = sorted(range(len(sizes)), key=lambda index: -padded[index])
    slabs = []
    while remaining:
        total, largest = sum(padded[index] for index in remaining), padded[remaining[0]]
        # The largest power of two up to the total, or more if the largest buffer needs more.
        size = max(1 << max(total.bit_length() - 1, 0), pinned_size(largest))
        offsets: dict[int, int] = {}
        used = 0
        for index in remaining:
            if used + padded[index] <= size:
                offsets[index] = used
                used += padded[index]
        slabs.append(Slab(size, offsets))
        remaining = [index for index in remaining if index not in offsets]
    return slabs


def pinned_size(size: int) -> int:
    """Return how many bytes torch allocates for a pinned tensor: ``size``, rounded up to a power of two."""
    return 1 << (size - 1).bit_length() if size else 0
