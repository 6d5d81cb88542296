"""Saving while training continues: a snapshot is copied to host memory at once, and a thread writes it."""

from __future__ import annotations

import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.backends import Backend, Fragment
from pipeline.checkpoint.pieces import GROUPS, KINDS, piece_key
from pipeline.checkpoint.saving import SavedCheckpoint, Snapshot, write_checkpoint
from pipeline.checkpoint.state import TrainingState
from pipeline.checkpoint.tensor_stream import TensorGroups, in_memory
from pipeline.distributed.device import synchronize
from pipeline.distributed.world import World
from pipeline.errors import CheckpointError


@dataclass(frozen=True)
class SaveOutcome:
    """The result of a save. All fields except the pause are the same on every rank."""

    step: int
    pause_s: float  # how long training on this rank waited for the previous save and for the copy
    saved: SavedCheckpoint | None
    problem: str | None  # why the save failed, in one line


class BackgroundSaver:
    """Saves one checkpoint at a time in its own thread, with collectives in its own process group.

    Args:
        config: the resolved config to store.
        asynchronous: if False, ``start`` returns after the checkpoint is complete.
    """

    def __init__(
        self,
        run_folder: Path,
        config: dict[str, Any],
        backend: Backend,
        world: World,
        *,
        keep_last: int,
        asynchronous: bool,
    ) -> None:
        self.run_folder = run_folder
        self.config = config
        self.cpu_world = world.with_cpu_group()
        self.keep_last = keep_last
        self.asynchronous = asynchronous
        self.last_step: int | None = None  # of the last save that was started
        self._taker = SnapshotTaker(backend, world)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._in_flight: tuple[int, float, Future[SavedCheckpoint]] | None = None

    def start(self, state: TrainingState) -> list[SaveOutcome]:
        """Copy the state and begin to write it. Return the outcome of the save in flight, if any. Collective."""
        started = time.perf_counter()
        outcomes = self.wait()
        snapshot = self._taker.take(state)
        future = self._thread.submit(
            write_checkpoint, self.run_folder, snapshot, self.config, self.cpu_world, self.keep_last
        )
        if not self.asynchronous:
            future.exception()
        self._in_flight = (state.step, time.perf_counter() - started, future)
        self.last_step = state.step
        return outcomes

    def poll(self) -> list[SaveOutcome]:
        """Return the outcome if a save has ended since the last call. Does not wait, so ranks may differ."""
        return self.wait() if self._in_flight and self._in_flight[2].done() else []

    def wait(self) -> list[SaveOutcome]:
        """Wait for the save in flight, if any, and return its outcome."""
        if self._in_flight is None:
            return []
        step, pause_s, future = self._in_flight
        self._in_flight = None
        try:
            return [SaveOutcome(step, pause_s, future.result(), None)]
        except CheckpointError as error:
            return [SaveOutcome(step, pause_s, None, str(error))]


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
        groups: TensorGroups = {group: {} for group in GROUPS}
        for fragment in fragments_to_write(self.backend, self.world):
            n, shape = fragment.weight.numel(), shapes[fragment.name]
            is_whole = n == torch.Size(shape).numel()
            for group, kinds in GROUPS.items():
                for kind in kinds:
                    key = piece_key(kind, fragment.name, None if is_whole else (fragment.start, fragment.start + n))
                    copy = self._copy(key, getattr(fragment, kind))
                    groups[group][key] = in_memory(copy.view(shape) if is_whole else copy)
        synchronize(self.world.device)
        return Snapshot(state, shapes, groups)

    def _copy(self, key: str, source: Tensor) -> Tensor:
        if key not in self._buffers:
            self._buffers[key] = torch.empty(source.shape, dtype=source.dtype, pin_memory=source.is_cuda)
        return self._buffers[key].copy_(source, non_blocking=True)


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
    tensors = {kind: getattr(fragment, kind)[low:high] for kind in KINDS}
    return replace(fragment, start=fragment.start + low, **tensors)
