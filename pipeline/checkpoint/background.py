"""Save checkpoints while training continues: copy the state to host memory, and let a thread write the copy."""

import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.backends import Backend, Fragment
from pipeline.checkpoint.pieces import GROUPS, group_of, piece_key
from pipeline.checkpoint.saving import SavedCheckpoint, Snapshot, write_checkpoint
from pipeline.checkpoint.state import TrainingState
from pipeline.checkpoint.tensor_stream import TensorGroups, in_memory
from pipeline.distributed.device import synchronize
from pipeline.distributed.world import World
from pipeline.errors import CheckpointError


@dataclass(frozen=True)
class SaveOutcome:
    """The result of a save. All fields except ``pause_s`` are equal on all ranks."""

    step: int
    pause_s: float  # the time that training on this rank waited for the previous save and for the copy
    saved: SavedCheckpoint | None
    problem: str | None  # the reason in one line if the save failed


class BackgroundSaver:
    """A saver that writes one checkpoint at a time in a thread. The thread has a process group of its own.

    Args:
        config: the resolved config, which is stored in each checkpoint.
        keep_last: the number of checkpoints to keep.
        asynchronous: if False, ``start`` waits until the checkpoint is complete.
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
        self.last_step: int | None = None  # the step of the last save that was started
        self._taker = SnapshotTaker(backend, world)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._in_flight: tuple[int, float, Future[SavedCheckpoint]] | None = None

    def start(self, state: TrainingState) -> list[SaveOutcome]:
        """Copy the state, and start to write the copy. If the previous save is not finished, wait for it first.

        This call is collective: every rank must make it. Returns the outcome of the previous save. Returns an empty
        list if this is the first save or an earlier call has returned the outcome.
        """
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
        """Return the outcome of a save that has ended since the last call. Returns an empty list if no save has ended.

        This call does not wait, so the result can differ between ranks.
        """
        return self.wait() if self._in_flight and self._in_flight[2].done() else []

    def wait(self) -> list[SaveOutcome]:
        """Wait until the last save has ended, and return its outcome.

        Returns an empty list if there was no save or an earlier call has returned its outcome.
        """
        if self._in_flight is None:
            return []
        step, pause_s, future = self._in_flight
        self._in_flight = None
        try:
            return [SaveOutcome(step, pause_s, future.result(), None)]
        except CheckpointError as error:
            return [SaveOutcome(step, pause_s, None, str(error))]


class SnapshotTaker:
    """Copies a rank's share of the state into host buffers.

    Every snapshot uses the same buffers, so a snapshot is valid until the next snapshot is taken. The buffers are as
    large as the copied state. With AdamW, this is 12 bytes per element that this rank writes. The buffers are in pinned
    memory if the state is on a GPU.
    """

    def __init__(self, backend: Backend, world: World) -> None:
        self.backend = backend
        self.world = world
        self._buffers: dict[str, Tensor] = {}

    def take(self, state: TrainingState) -> Snapshot:
        """Copy the share of the state that this rank writes."""
        shapes = {name: list(shape) for name, shape in self.backend.parameter_shapes.items()}
        groups: TensorGroups = {group: {} for group in GROUPS}
        for fragment in fragments_to_write(self.backend, self.world):
            n, shape = fragment.weight.numel(), shapes[fragment.name]
            is_whole = n == torch.Size(shape).numel()
            for kind, tensor in fragment.tensors.items():
                key = piece_key(kind, fragment.name, None if is_whole else (fragment.start, fragment.start + n))
                copy = self._copy(key, tensor)
                groups[group_of(kind)][key] = in_memory(copy.view(shape) if is_whole else copy)
        synchronize(self.world.device)
        return Snapshot(state, shapes, self.backend.state_names, groups)

    def _copy(self, key: str, source: Tensor) -> Tensor:
        if key not in self._buffers:
            self._buffers[key] = torch.empty(source.shape, dtype=source.dtype, pin_memory=source.is_cuda)
        return self._buffers[key].copy_(source, non_blocking=True)


def fragments_to_write(backend: Backend, world: World) -> list[Fragment]:
    """Return the fragments that this rank writes.

    These are all fragments of this rank. But if every rank holds all fragments, each rank writes an equal share.
    """
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
    """Return elements ``low`` to ``high - 1`` of a fragment, counted from the first element of the fragment."""
    state = {name: tensor[low:high] for name, tensor in fragment.state.items()}
    return replace(fragment, start=fragment.start + low, weight=fragment.weight[low:high], state=state)
