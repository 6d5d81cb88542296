"""Record the progress of each rank's main thread, and find stuck ranks.

All ranks pass the same *marks* in the same order. A mark is, for example, the beginning of a phase or a collective. The
*position* of a rank is the number of marks that it has passed. A stuck rank passes no mark, and shows one of two signs:

- It is *still*: it uses no CPU time, for example because a file system does not answer.
- It *loops*: since its last mark, it has used much more CPU time than ever before between two marks.

A healthy rank shows the same signs while it waits for a stuck rank. Therefore, ``find_stuck`` also compares positions.
"""

import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from types import FrameType

#: A rank may be idle for this long in a phase that waits for a compiler, a download or a disk.
PATIENCE_S = 600.0
#: A rank loops if its CPU time since the last mark is more than this many times the longest so far. The factor is
#: large, because waiting for a shared GPU also uses CPU time.
LOOP_FACTOR = 20.0
#: A rank may be idle for this many times its longest wait so far. On a slow network, a healthy step needs minutes.
WAIT_FACTOR = 3.0
#: A thread uses less than this share of a core if it only polls.
_LEAST_CPU_SHARE = 0.01
#: A message names at most this many ranks that are in the same state, and says how many others there are.
NAMED_RANKS = 4
#: A function of one of these modules is active only while torch.compile compiles.
_COMPILERS = ("torch._dynamo.convert_frame", "torch._inductor.compile_fx")


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


def find_stuck(places: Mapping[int, Place], timeout_s: float) -> list[int]:
    """Return the ranks that are stuck.

    An overdue rank (see ``Place.is_overdue``) is stuck if another rank has passed more marks, such as micro-batches
    or collectives. If all ranks are overdue, those that have passed the fewest marks are stuck.

    Args:
        places: what the main thread of each rank is doing.
    """
    overdue = [rank for rank, place in places.items() if place.is_overdue(timeout_s)]
    positions = [place.position for place in places.values()]
    if len(overdue) == len(places):
        return [rank for rank in overdue if places[rank].position == min(positions)]
    return [rank for rank in overdue if places[rank].position < max(positions)]


def describe_places(places: Mapping[int, Place], stuck: Sequence[int], name: Callable[[int], str]) -> str:
    """Return a text that says which ranks are stuck, and what all ranks are doing.

    Args:
        name: returns the host and the process id of a rank. It is called only for a few stuck ranks.
    """
    are_stuck = set(stuck)
    groups: dict[tuple[bool, str, str], list[int]] = {}
    for rank, place in places.items():
        groups.setdefault((rank not in are_stuck, place.phase, place.line), []).append(rank)
    texts = []
    for (is_other, phase, line), ranks in sorted(groups.items(), key=lambda item: (item[0][0], len(item[1])))[:4]:
        named = ", ".join(f"rank {rank}" + ("" if is_other else f" ({name(rank)})") for rank in ranks[:NAMED_RANKS])
        more = f" and {len(ranks) - NAMED_RANKS} more" if len(ranks) > NAMED_RANKS else ""
        delay = "" if is_other else f" {_describe_delay([places[rank] for rank in ranks])},"
        texts.append(f"{named}{more}:{delay} in {phase} ({line})")
    return "; ".join(texts)


def _describe_delay(places: Sequence[Place]) -> str:
    idle_s, busy_s = min(place.idle_s for place in places), min(place.busy_s for place in places)
    if idle_s >= busy_s:
        return f"not moved for {idle_s:.0f} s"
    usual_s = max(place.longest_s for place in places)
    return f"no progress in {busy_s:.0f} s of CPU time (at most {usual_s:.2g} s before)"
