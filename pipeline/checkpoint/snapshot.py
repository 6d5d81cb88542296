"""Copying the training state of this rank to host memory, so that training can continue while it is written."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.backends import Backend, Fragment
from pipeline.checkpoint.pieces import GROUPS, piece_key
from pipeline.checkpoint.state import TrainingState
from pipeline.distributed.device import synchronize
from pipeline.distributed.world import World


@dataclass(frozen=True)
class Snapshot:
    """A copy of what this rank writes of a training state."""

    state: TrainingState
    shapes: dict[str, list[int]]  # of all parameters, by canonical name
    groups: dict[str, dict[str, Tensor]]  # weights or moments -> key -> fp32 tensor in host memory


class SnapshotTaker:
    """Copies what a rank writes into buffers that it reuses for every snapshot.

    A snapshot is valid until the next one is taken. The buffers take 12 bytes of host memory per element that this
    rank writes. They are pinned if the state is on a GPU.
    """

    def __init__(self, backend: Backend, world: World) -> None:
        self.backend = backend
        self.world = world
        self._buffers: dict[str, Tensor] = {}

    def take(self, state: TrainingState) -> Snapshot:
        """Copy what this rank writes."""
        shapes = {name: list(shape) for name, shape in self.backend.parameter_shapes.items()}
        groups: dict[str, dict[str, Tensor]] = {group: {} for group in GROUPS}
        for fragment in fragments_to_write(self.backend, self.world):
            n, shape = fragment.weight.numel(), shapes[fragment.name]
            is_whole = n == torch.Size(shape).numel()
            for group, kinds in GROUPS.items():
                for kind in kinds:
                    key = piece_key(kind, fragment.name, None if is_whole else (fragment.start, fragment.start + n))
                    copy = self._copy(key, getattr(fragment, kind))
                    groups[group][key] = copy.view(shape) if is_whole else copy
        synchronize(self.world.device)
        return Snapshot(state, shapes, groups)

    def _copy(self, key: str, source: Tensor) -> Tensor:
        buffer = self._buffers.get(key)
        if buffer is None:
            buffer = torch.empty(source.shape, dtype=source.dtype, pin_memory=source.is_cuda)
            self._buffers[key] = buffer
        return buffer.copy_(source, non_blocking=True)


def fragments_to_write(backend: Backend, world: World) -> list[Fragment]:
    """Return all fragments of this rank, or an equal share of them if every rank holds the same."""
    fragments = backend.fragments()
    if not backend.replicated or world.size == 1:
        return fragments
    total = sum(fragment.weight.numel() for fragment in fragments)
    begin, end = total * world.rank // world.size, total * (world.rank + 1) // world.size
    share, position = [], 0
    for fragment in fragments:
        n = fragment.weight.numel()
        low, high = max(begin - position, 0), min(end - position, n)
        if low < high:
            share.append(slice_fragment(fragment, low, high))
        position += n
    return share


def slice_fragment(fragment: Fragment, low: int, high: int) -> Fragment:
    """Return elements ``low`` to ``high`` of a fragment, counted from its first element."""
    return Fragment(
        fragment.name,
        fragment.start + low,
        fragment.weight[low:high],
        fragment.exp_avg[low:high],
        fragment.exp_avg_sq[low:high],
    )
