"""Handle signals that ask a run to stop, so that all ranks stop after the same step."""

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from pipeline.distributed.world import World

#: Sent by schedulers, by Ctrl-C, and by Slurm with --signal=USR1@120 before the time limit.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
#: The launcher forwards a Ctrl-C that the ranks have already received. A SIGINT after this time is a second Ctrl-C.
_ONE_REQUEST_S = 3.0


class StopRequest:
    """Records signals, and tells all ranks if any rank has received a signal."""

    def __init__(self, world: World) -> None:
        self._world = world.with_cpu_group()
        self.received = 0  # number of the signal that this rank has received, or 0; other ranks may not know it yet
        self._received_at = 0.0

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Record signals inside the block instead of ending the process. A second Ctrl-C ends the process.

        The handlers stay in place after a ``RuntimeError``, because a lost rank may be the cause. The launcher then
        sends SIGTERM to the remaining ranks, which must not end before they have named the lost rank.
        """
        before = {number: signal.signal(number, self._record) for number in STOP_SIGNALS}
        try:
            yield
        except RuntimeError:
            before.clear()
            raise
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _record(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if number == signal.SIGINT and self.received and now - self._received_at > _ONE_REQUEST_S:
            raise KeyboardInterrupt
        if not self.received:
            self.received, self._received_at = number, now

    def agreed(self) -> signal.Signals | None:
        """Return a signal that any rank has received, the same on all ranks. Returns None if no rank has received one.

        This call is collective: every rank must make it.
        """
        number = self._world.max(self.received)
        return signal.Signals(number) if number else None
