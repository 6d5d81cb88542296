"""A device that works in the background, and the clock of its host. The test moves the time."""

from __future__ import annotations

from typing import Any

from pipeline.distributed.step_clock import HostClock


class FakeDevice(HostClock):
    """A device with queued work, for which the host waits in ``synchronize``.

    The object stands for the module ``time``, and for the clock of the device. The clock starts far from zero, as real
    clocks do.
    """

    def __init__(self) -> None:
        self.now_s = 12345.0
        self.queued_s = 0.0

    def perf_counter(self) -> float:
        return self.now_s

    def mark(self) -> float:
        """Return when the device reaches this point."""
        return self.now_s + self.queued_s

    def has_passed(self, mark: float) -> bool:
        return mark <= self.now_s

    def synchronize(self, *_: Any) -> None:
        self.now_s, self.queued_s = self.now_s + self.queued_s, 0.0

    def wait(self, seconds: float) -> None:
        """Let the host wait while the device works."""
        self.now_s, self.queued_s = self.now_s + seconds, max(0.0, self.queued_s - seconds)
