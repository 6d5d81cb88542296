"""Write ``heartbeat.json``, from which other programs see whether the run makes progress."""

import json
import logging
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from pathlib import Path

from data_tools.storage.atomic import atomic_file, hidden_partial_path
from pipeline.run_folder.layout import HEARTBEAT_FILE

log = logging.getLogger(__name__)

INTERVAL_S = 5.0
#: A run without a heartbeat for this time is stale. Compilation can take minutes.
STALE_AFTER_S = 600.0


class HeartbeatFile:
    """Writes the step, the state and the time to ``heartbeat.json`` in the run folder.

    Only the main thread writes, so the time in the file becomes old if this thread is stuck. A new state is written at
    once. While the state does not change, the file is written at most every ``INTERVAL_S`` seconds.

    Args:
        run_folder: the run folder on the main rank, and None on all other ranks. With None, nothing is written.
    """

    def __init__(self, run_folder: Path | None, now: Callable[[], float] = time.monotonic) -> None:
        self._path = run_folder / HEARTBEAT_FILE if run_folder else None
        self._now = now
        self._state = "starting"
        self._step = 0
        self._next_write = 0.0  # on the clock ``now``
        self._has_failed = False

    @contextmanager
    def starting(self, step: int) -> Iterator[None]:
        """Return a context manager for the whole run. It writes the state ``starting`` before the ``with`` block.

        If the block fails while the state is still ``starting``, the context manager restores the earlier file.
        """
        before = self._path.read_bytes() if self._path and self._path.exists() else None
        self.enter("starting", step)
        try:
            yield
        except BaseException:
            if self._path and self._state == "starting":
                with suppress(OSError):
                    self._path.unlink() if before is None else self._replace(self._path, before)
            raise

    def enter(self, state: str, step: int) -> None:
        """Write a new state of the run into the file.

        Args:
            state: ``starting``, ``training``, ``evaluating``, ``saving``, ``finished``, ``interrupted`` or ``failed``.
            step: the number of finished steps.
        """
        if state != self._state:
            self._next_write = 0.0
        self._state, self._step = state, step
        self.beat()

    def beat(self) -> None:
        """Write the file again if the last write was at least ``INTERVAL_S`` seconds ago."""
        if self._path and self._now() >= self._next_write:
            self._next_write = self._now() + INTERVAL_S
            self._write(self._path)

    def _write(self, path: Path) -> None:
        content = {
            "state": self._state,
            "step": self._step,
            "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "host": socket.gethostname(),
            "pid": os.getpid(),
        }
        try:
            self._replace(path, (json.dumps(content) + "\n").encode("ascii"))
        except OSError as error:
            if not self._has_failed:
                log.warning("cannot write %s (%s); training continues", path, error.strerror)
            self._has_failed = True

    @staticmethod
    def _replace(path: Path, content: bytes) -> None:
        aside = hidden_partial_path(path)
        with atomic_file(path, aside, durable=False) as file:
            file.write(content)


def heartbeat_age_s(run_folder: Path) -> float | None:
    """Return the seconds since the last write of ``heartbeat.json``, or None if there is no file."""
    try:
        return max(0.0, time.time() - (run_folder / HEARTBEAT_FILE).stat().st_mtime)
    except OSError:
        return None
