"""Saving while training continues: a snapshot is taken at once, and a thread writes it."""

from __future__ import annotations

import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.backends import Backend
from pipeline.checkpoint.saving import SavedCheckpoint, write_checkpoint
from pipeline.checkpoint.snapshot import SnapshotTaker
from pipeline.checkpoint.state import TrainingState
from pipeline.distributed.world import World
from pipeline.errors import CheckpointError


@dataclass(frozen=True)
class SaveOutcome:
    """The result of a save. All fields except the pause are the same on every rank."""

    step: int
    pause_s: float  # that training on this rank waited for the previous save and for the copy
    saved: SavedCheckpoint | None
    problem: str | None  # why the save failed, in one line


class BackgroundSaver:
    """Saves one checkpoint at a time in its own thread, with collectives in its own process group.

    Args:
        config: the resolved config to store.
        asynchronous: if False, ``start`` returns when the checkpoint is complete.
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
        """Copy the state and begin to write it. Collective.

        Returns:
            The outcome of the previous save if it was still in flight.
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
        """Return the outcome of a save that has ended since the last call, without waiting. Ranks may differ."""
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
