"""This rank's part of a training state, copied to host memory so that training can go on while it is written."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.backends import Backend, Fragment
from pipeline.checkpoint.folder import TrainingState
from pipeline.checkpoint.pieces import KINDS, WEIGHT, piece_key
from pipeline.distributed.device import synchronize
from pipeline.distributed.world import World


@dataclass(frozen=True)
class Snapshot:
    """A training state that no longer changes."""

    state: TrainingState
    shapes: dict[str, list[int]]  # of all parameters, by canonical name
    parts: dict[str, dict[str, Tensor]]  # weights or moments -> key -> fp32 tensor in host memory


class SnapshotTaker:
    """Copies a rank's share into buffers that it keeps from one snapshot to the next.

    A snapshot is valid until the next one is taken: at most one is in use. The buffers take as much host
    memory as the share, 12 bytes an element; on CUDA they are pinned.
    """

    def __init__(self, backend: Backend, world: World) -> None:
        self.backend = backend
        self.world = world
        self._buffers: dict[str, Tensor] = {}

    def take(self, state: TrainingState) -> Snapshot:
        """Copy what this rank has to write."""
        shapes = {name: list(shape) for name, shape in self.backend.parameter_shapes.items()}
        parts: dict[str, dict[str, Tensor]] = {"weights": {}, "moments": {}}
        for fragment in own_share(self.backend, self.world):
            n = fragment.weight.numel()
            whole = n == torch.Size(shapes[fragment.name]).numel()
            run = None if whole else (fragment.start, fragment.start + n)
            for kind in KINDS:
                key = piece_key(kind, fragment.name, run)
                copy = self._copied(key, getattr(fragment, kind))
                parts["weights" if kind == WEIGHT else "moments"][key] = (
                    copy.view(shapes[fragment.name]) if whole else copy
                )
        synchronize(self.world.device)
        return Snapshot(state, shapes, parts)

    def _copied(self, key: str, source: Tensor) -> Tensor:
        buffer = self._buffers.get(key)
        if buffer is None:
            buffer = torch.empty(source.shape, dtype=source.dtype, pin_memory=source.is_cuda)
            self._buffers[key] = buffer
        return buffer.copy_(source, non_blocking=True)


def own_share(backend: Backend, world: World) -> list[Fragment]:
    """What this rank writes: all that it holds, or its even part of what every rank holds."""
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
            share.append(cut(fragment, low, high))
        position += n
    return share


def cut(fragment: Fragment, low: int, high: int) -> Fragment:
    """Elements ``low`` to ``high`` of a fragment, counted in the fragment."""
    return Fragment(
        fragment.name,
        fragment.start + low,
        fragment.weight[low:high],
        fragment.exp_avg[low:high],
        fragment.exp_avg_sq[low:high],
    )
