"""Signals that ask a run to stop: noted at once, obeyed by all ranks after the same step."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from pipeline.distributed.world import World

#: Schedulers, Ctrl-C, and the warning that Slurm's --signal=USR1@120 sends before the time is up.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
#: A launcher passes on the Ctrl-C that its ranks have received too; later ones are a person's.
_ONE_REQUEST_S = 3.0


class StopRequest:
    """Whether a signal has asked any rank to stop.

    Args:
        world: the ranks; they talk through ``world.with_cpu_group()``.
    """

    def __init__(self, world: World) -> None:
        self._world = world.with_cpu_group()
        self._received = 0
        self._received_at = 0.0

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Note signals inside instead of dying of them; a second Ctrl-C is an ordinary one.

        After a ``RuntimeError``, which a lost rank causes, they are still noted: the launcher ends the ranks that are
        left with SIGTERM, and would cut off what they have to say.
        """
        before = {number: signal.signal(number, self._note) for number in STOP_SIGNALS}
        may_be_a_lost_rank = False
        try:
            yield
        except RuntimeError:
            may_be_a_lost_rank = True
            raise
        finally:
            if not may_be_a_lost_rank:
                for number, handler in before.items():
                    signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if number == signal.SIGINT and self._received and now - self._received_at > _ONE_REQUEST_S:
            raise KeyboardInterrupt
        if not self._received:
            self._received, self._received_at = number, now

    @property
    def noted(self) -> bool:
        """Whether a signal has asked this rank; the others may not know yet."""
        return bool(self._received)

    def agreed(self) -> signal.Signals | None:
        """The signal that any rank has received, the same on all. Collective."""
        number = self._world.max(self._received)
        return signal.Signals(number) if number else None
