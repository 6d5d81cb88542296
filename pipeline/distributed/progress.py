"""Record the progress of the main thread of a rank.

All ranks pass the same *marks* in the same order. A mark is, for example, the beginning of a phase or a collective. The
*position* of a rank is the number of marks that it has passed. ``stuck_ranks`` compares the positions.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

#: A rank may be idle for this long in a phase that waits for a compiler, a download or a disk.
PATIENCE_S = 600.0


class Progress:
    """The progress of one rank. The main thread records it, and the thread of ``Heartbeat`` reads it."""

    def __init__(self) -> None:
        self.position = 0
        self.phase = "start"
        self.is_patient = True
        self.repeats = False
        self.moves = 0
        self.longest_s = 0.0  # the most CPU time between two marks of a phase that repeats
        self.excused_s = 0.0  # the CPU time of compiling since the last mark; ``MainThread`` sets it
        self.marked_at_s = time.thread_time()  # the CPU time of the main thread at the last mark
        self.listener: Callable[[], None] = lambda: None  # is called at each mark and move

    def reach(self, phase: str, *, is_patient: bool = False, repeats: bool = True) -> None:
        """Record that a phase of the run begins. All ranks must make this call in the same order.

        Args:
            is_patient: whether a healthy rank can spend minutes in this phase without recording progress.
            repeats: whether the run repeats this phase. If True, the CPU times of this phase count for
                ``Place.longest_s``.
        """
        self._restart_clock()
        self.phase, self.is_patient, self.repeats = phase, is_patient, repeats
        self.position += 1

    def pass_mark(self) -> None:
        """Record that this rank has passed a mark, such as a collective.

        All ranks must pass the same marks in the same order.
        """
        self._restart_clock()
        self.position += 1

    def move(self) -> None:
        """Record progress of this rank, so that it does not count as stuck.

        Other ranks need not make the same call.
        """
        self._restart_clock()
        self.moves += 1

    @contextmanager
    def patience(self) -> Iterator[None]:
        """Return a context manager for rare work that can take minutes. This call is not collective.

        Inside the ``with`` block, this rank counts as stuck only after ``PATIENCE_S`` seconds without progress.
        """
        before = self.is_patient, self.repeats
        self.move()
        self.is_patient, self.repeats = True, False
        try:
            yield
        finally:
            self.move()
            self.is_patient, self.repeats = before

    def _restart_clock(self) -> None:
        now = time.thread_time()
        if self.repeats:
            self.longest_s = max(self.longest_s, now - self.marked_at_s - self.excused_s)
        self.marked_at_s, self.excused_s = now, 0.0
        self.listener()
