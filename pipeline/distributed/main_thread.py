"""Observe from another thread what the main thread of this process is doing."""

import json
import os
import sys
import threading
import time
import traceback
from dataclasses import asdict, dataclass
from types import FrameType

from pipeline.distributed.progress import PATIENCE_S, Progress

#: A rank loops if its CPU time since the last mark is more than this many times the longest so far. The factor is
#: large, because waiting for a shared GPU also uses CPU time.
LOOP_FACTOR = 20.0
#: A rank may be idle for this many times its longest wait so far. On a slow network, a healthy step needs minutes.
WAIT_FACTOR = 3.0
#: A thread uses less than this share of a core if it only polls.
_LEAST_CPU_SHARE = 0.01
#: A function of one of these modules is active only while torch.compile compiles.
_COMPILERS = ("torch._dynamo.convert_frame", "torch._inductor.compile_fx")


@dataclass(frozen=True)
class Place:
    """What the main thread of a rank is doing, and for how long it has made no progress."""

    position: int  # how many marks the rank has passed
    phase: str
    is_patient: bool
    idle_s: float  # the time without progress and without CPU time
    line: str  # the current line of source code
    busy_s: float = 0.0  # the CPU time since the last mark; 0 in a patient phase
    longest_s: float = 0.0  # the most CPU time between two marks so far; 0 if not known yet
    longest_wait_s: float = 0.0  # the longest time between two signs of progress so far, in phases that repeat

    def to_json(self) -> str:
        """Return this object as JSON text, for a heartbeat."""
        return json.dumps(asdict(self))

    def is_overdue(self, timeout_s: float) -> bool:
        """Return whether the rank seems to be stuck: it loops (see ``loops``), or it has been idle for too long.

        Args:
            timeout_s: the largest allowed ``idle_s``. If ``is_patient``, at least ``PATIENCE_S`` are allowed. At least
                ``WAIT_FACTOR * longest_wait_s`` are always allowed.
        """
        allowed_s = max(timeout_s, WAIT_FACTOR * self.longest_wait_s, PATIENCE_S if self.is_patient else 0.0)
        return self.idle_s > allowed_s or self.loops(timeout_s)

    def loops(self, timeout_s: float) -> bool:
        """Return whether the rank computes without progress, for example in an infinite loop.

        ``busy_s`` is the CPU time since the last sign of progress. ``longest_s`` is the longest CPU time so far between
        two signs of progress. The result is True if ``busy_s`` exceeds both ``timeout_s`` and
        ``LOOP_FACTOR * longest_s``. If ``longest_s`` is not known yet, the result is False.
        """
        return self.longest_s > 0 and self.busy_s > max(timeout_s, LOOP_FACTOR * self.longest_s)


class MainThread:
    """Tells another thread what the main thread is doing. Create this object in the main thread."""

    def __init__(self, progress: Progress, *, is_patient: bool) -> None:
        self._progress = progress
        self._is_patient = is_patient
        self._thread_id = threading.get_ident()
        self._seen = (progress.position, progress.moves)
        self._own_cpu_s = self._read_own_cpu_s()
        self._cpu_s = self._read_cpu_s()
        self._idle_s = 0.0
        self._repeats = progress.repeats
        self._wait_s = self._longest_wait_s = 0.0

    def observe(self, elapsed_s: float) -> Place:
        """Return what the main thread is doing.

        Args:
            elapsed_s: the seconds since the last call, without time in which the process was suspended.
        """
        progress = self._progress
        seen, cpu_s, own_cpu_s = (progress.position, progress.moves), self._read_cpu_s(), self._read_own_cpu_s()
        is_compiling = _is_compiling()
        if seen == self._seen:
            self._wait_s += 0.0 if is_compiling else elapsed_s
        else:
            if self._repeats:
                self._longest_wait_s = max(self._longest_wait_s, self._wait_s)
            self._wait_s, self._repeats = 0.0, progress.repeats
        has_moved = seen != self._seen or cpu_s - self._cpu_s > _LEAST_CPU_SHARE * elapsed_s
        self._idle_s = 0.0 if has_moved else self._idle_s + elapsed_s
        if is_compiling:
            progress.excused_s += own_cpu_s - self._own_cpu_s
        self._seen, self._cpu_s, self._own_cpu_s = seen, cpu_s, own_cpu_s
        is_busy = not (progress.is_patient or is_compiling)
        return Place(
            progress.position,
            progress.phase,
            self._is_patient or progress.is_patient or is_compiling,
            self._idle_s,
            self._line(),
            own_cpu_s - progress.marked_at_s - progress.excused_s if is_busy else 0.0,
            progress.longest_s,
            self._longest_wait_s,
        )

    def stack(self) -> str:
        """Return the call stack of the main thread as text."""
        return "".join(traceback.format_stack(sys._current_frames().get(self._thread_id)))

    def _read_cpu_s(self) -> float:
        """Return the CPU time of the main thread, or of the process if other threads may do the work."""
        if self._progress.is_patient or not hasattr(time, "pthread_getcpuclockid"):
            return time.process_time() - time.thread_time()  # without the time of the thread that observes
        return self._read_own_cpu_s()

    def _read_own_cpu_s(self) -> float:
        """Return the CPU time of the main thread, or 0 if the operating system does not tell."""
        if not hasattr(time, "pthread_getcpuclockid"):
            return 0.0
        return time.clock_gettime(time.pthread_getcpuclockid(self._thread_id))

    def _line(self) -> str:
        """Return the main thread's line in this project's code, and its line in a called package, if there is one."""
        innermost = frame = sys._current_frames().get(self._thread_id)
        while frame and not frame.f_globals.get("__name__", "").startswith(("pipeline.", "data_tools.")):
            frame = frame.f_back
        frames = [each for each in (frame, innermost) if each]
        return " > ".join(dict.fromkeys(map(_describe_frame, frames)))


def _is_compiling() -> bool:
    """Return whether any thread compiles. A backward pass can compile in another thread."""
    for frame in sys._current_frames().values():
        inner: FrameType | None = frame
        while inner:
            if inner.f_globals.get("__name__") in _COMPILERS:
                return True
            inner = inner.f_back
    return False


def _describe_frame(frame: FrameType) -> str:
    return f"{os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno} in {frame.f_code.co_name}"
