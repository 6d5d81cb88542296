"""Save checkpoints while training continues: copy the state to host memory, and write the copy in a thread."""

import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.backends import Backend, Fragment
from pipeline.checkpoint.layout import GROUPS, group_of
from pipeline.checkpoint.mirror import Mirror
from pipeline.checkpoint.pieces import piece_key
from pipeline.checkpoint.saving import SavedCheckpoint, Snapshot, write_checkpoint
from pipeline.checkpoint.state import TrainingState
from pipeline.checkpoint.tensor_stream import TensorGroups, in_memory
from pipeline.distributed.world import World
from pipeline.errors import CheckpointError
from pipeline.hardware.device import synchronize
from pipeline.hardware.pinned_buffers import allocate_host_buffers


@dataclass(frozen=True)
class SaveOutcome:
    """The result of saving one checkpoint. Only ``pause_s`` differs between ranks."""

    step: int
    pause_s: float  # how long training on this rank waited for the previous save and for the copy
    saved: SavedCheckpoint | None
    problem: str | None  # the reason in one line if nothing was saved

    @property
    def failure(self) -> str | None:
        """Return in one line why no run can resume from this save, or None if a run can."""
        if self.saved and self.saved.not_finite:
            return f"{self.saved}, and good older checkpoints are kept"
        return self.problem


class BackgroundSaver:
    """Saves checkpoints one at a time, in a thread with its own process group.

    Args:
        config: the resolved config, which each checkpoint contains.
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
        mirror: Mirror | None = None,
    ) -> None:
        self.mirror = mirror
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
        """Wait for the previous save. Then copy the state, and start a thread that writes the copy.

        Every rank must make this call. Returns the outcome of the previous save, as ``wait`` does.
        """
        started = time.perf_counter()
        outcomes = self.wait()
        snapshot = self._taker.take(state)
        future = self._thread.submit(self._write, snapshot)
        if not self.asynchronous:
            future.exception()
        self._in_flight = (state.step, time.perf_counter() - started, future)
        self.last_step = state.step
        return outcomes

    def _write(self, snapshot: Snapshot) -> SavedCheckpoint:
        arguments = (self.run_folder, snapshot, self.config, self.cpu_world, self.keep_last)
        if self.mirror is None:
            return write_checkpoint(*arguments)
        saved = write_checkpoint(*arguments, pinned=self.mirror.pinned)
        self.mirror.request()
        return saved

    def poll(self) -> list[SaveOutcome]:
        """Return the outcome of the last save in a list.

        Returns [] if the save is still running, or if the outcome was returned before. Ranks can finish a save at
        different times, so the result can differ between ranks.
        """
        return self.wait() if self._in_flight and self._in_flight[2].done() else []

    def wait(self) -> list[SaveOutcome]:
        """Wait for the last save. Return its outcome in a list, or [] if the outcome was returned before."""
        if self._in_flight is None:
            return []
        step, pause_s, future = self._in_flight
        self._in_flight = None
        try:
            return [SaveOutcome(step, pause_s, future.result(), None)]
        except CheckpointError as error:
            return [SaveOutcome(step, pause_s, None, str(error))]


class SnapshotTaker:
    """Copies this rank's share of the weights and optimizer state to host memory. Copies from a GPU are pinned.

    All snapshots use the same buffers, so a snapshot is valid until the next one is taken. With AdamW, the buffers need
    12 bytes per weight in the share.
    """

    def __init__(self, backend: Backend, world: World) -> None:
        self.backend = backend
        self.world = world
        self._buffers: dict[str, Tensor] = {}

    def take(self, state: TrainingState) -> Snapshot:
        """Copy this rank's share of the weights and optimizer state. Return the copy together with ``state``."""
        shapes = {name: list(shape) for name, shape in self.backend.parameter_shapes.items()}
        groups: TensorGroups = {group: {} for group in GROUPS}
        sources: dict[str, Tensor] = {}
        group_of_key: dict[str, str] = {}
        for fragment in fragments_to_write(self.backend, self.world):
            n, shape = fragment.weight.numel(), shapes[fragment.name]
            is_whole = n == torch.Size(shape).numel()
            for kind, tensor in fragment.tensors.items():
                key = piece_key(kind, fragment.name, None if is_whole else (fragment.start, fragment.start + n))
                sources[key] = tensor.view(shape) if is_whole else tensor
                group_of_key[key] = group_of(kind)
        if not self._buffers:
            self._buffers = allocate_host_buffers(sources)
        for key, source in sources.items():
            groups[group_of_key[key]][key] = in_memory(self._buffers[key].copy_(source, non_blocking=True))
        synchronize(self.world.device)
        return Snapshot(state, shapes, self.backend.state_names, groups)


def fragments_to_write(backend: Backend, world: World) -> list[Fragment]:
    """Return the fragments (ranges of parameters) that this rank must write into a checkpoint.

    If several ranks hold the same elements, each of them writes an equal share.
    """
    fragments = backend.fragments()
    copy, copies = world.rank // backend.ranks_per_copy, world.size // backend.ranks_per_copy
    if copies == 1:
        return fragments
    total = sum(fragment.weight.numel() for fragment in fragments)
    begin, end = total * copy // copies, total * (copy + 1) // copies
    share, position = [], 0
    for fragment in fragments:
        n = fragment.weight.numel()
        low, high = max(begin - position, 0), min(end - position, n)
        if low < high:
            share.append(slice_fragment(fragment, low, high))
        position += n
    return share


def slice_fragment(fragment: Fragment, low: int, high: int) -> Fragment:
    """Return elements ``low`` to ``high - 1`` of a fragment, counted from the beginning of the fragment."""
    state = {name: tensor[low:high] for name, tensor in fragment.state.items()}
    return replace(fragment, start=fragment.start + low, weight=fragment.weight[low:high], state=state)
