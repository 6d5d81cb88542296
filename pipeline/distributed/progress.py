"""What the main thread of each rank is doing, and how a stuck rank is told from one that works or waits.

All ranks pass the same marks in the same order: the phases of a run, micro-batches, and collectives. The position of a
rank is the number of marks that it has passed. A rank moves if it passes a mark, or if it uses CPU time. A rank that
waits for another one in a collective does not move, as little as a rank that waits for a file system that is gone, so
no rank is judged alone: see ``find_stuck``.
"""

import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from types import FrameType

#: How long a rank may stand still in a phase that can wait without using CPU time: for a compiler, a download, a disk.
PATIENCE_S = 600.0
#: A thread uses less than this share of a core if it only polls.
_LEAST_CPU_SHARE = 0.01


class Progress:
    """The phase that a rank is in, set by its main thread and read by the heartbeat's thread."""

    def __init__(self) -> None:
        self.position = 0
        self.phase = "start"
        self.is_patient = True
        self.moves = 0

    def reach(self, phase: str, *, is_patient: bool = False) -> None:
        """Begin a phase. All ranks must make the same calls in the same order.

        Args:
            is_patient: a healthy rank may wait for minutes in this phase without using CPU time.
        """
        self.phase, self.is_patient = phase, is_patient
        self.pass_mark()

    def pass_mark(self) -> None:
        """Count a point within the phase that all ranks pass, such as a collective."""
        self.position += 1

    def move(self) -> None:
        """Count a sign of life that need not be the same on all ranks."""
        self.moves += 1


@dataclass(frozen=True)
class Place:
    """Where the main thread of a rank is, and for how long it has not moved."""

    position: int
    phase: str
    is_patient: bool
    still_s: float
    line: str  # of the source

    def to_json(self) -> str:
        """Return the place for another rank."""
        return json.dumps(asdict(self))

    def is_overdue(self, timeout_s: float) -> bool:
        """Return whether the rank has not moved for longer than its phase allows."""
        return self.still_s > (max(timeout_s, PATIENCE_S) if self.is_patient else timeout_s)


class MainThread:
    """Observes the thread that creates this object, from another thread."""

    def __init__(self, progress: Progress, *, is_patient: bool) -> None:
        self._progress = progress
        self._is_patient = is_patient
        self._thread_id = threading.get_ident()
        self._seen = (progress.position, progress.moves)
        self._cpu_s = self._used_cpu_s()
        self._still_s = 0.0

    def observe(self, elapsed_s: float) -> Place:
        """Return where the thread is. ``elapsed_s``: the time since the last call, without time in suspension."""
        progress = self._progress
        seen, cpu_s = (progress.position, progress.moves), self._used_cpu_s()
        has_moved = seen != self._seen or cpu_s - self._cpu_s > _LEAST_CPU_SHARE * elapsed_s
        self._still_s = 0.0 if has_moved else self._still_s + elapsed_s
        self._seen, self._cpu_s = seen, cpu_s
        is_patient = self._is_patient or progress.is_patient
        return Place(progress.position, progress.phase, is_patient, self._still_s, self._line())

    def stack(self) -> str:
        """Return the stack of the thread as text."""
        return "".join(traceback.format_stack(sys._current_frames().get(self._thread_id)))

    def _used_cpu_s(self) -> float:
        """Return the CPU time of the thread; of the whole process if other threads work for it, or as a substitute."""
        if self._progress.is_patient or not hasattr(time, "pthread_getcpuclockid"):
            return time.process_time() - time.thread_time()  # without the thread that observes
        return time.clock_gettime(time.pthread_getcpuclockid(self._thread_id))

    def _line(self) -> str:
        """Return the innermost line of this project, and the innermost line of all."""
        innermost = frame = sys._current_frames().get(self._thread_id)
        while frame and not frame.f_globals.get("__name__", "").startswith(("pipeline.", "data_tools.")):
            frame = frame.f_back
        frames = [each for each in (frame, innermost) if each]
        return " > ".join(dict.fromkeys(map(_describe_frame, frames)))


def _describe_frame(frame: FrameType) -> str:
    return f"{os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno} in {frame.f_code.co_name}"


def find_stuck(places: Mapping[int, Place], timeout_s: float) -> list[int]:
    """Return the ranks that are stuck. Returns an empty list if the run is healthy.

    A rank is stuck if it has not moved for its time, and another rank is ahead of it. If no rank has moved for its
    time, the rearmost ranks are stuck: all of them if all are at the same mark.
    """
    overdue = [rank for rank, place in places.items() if place.is_overdue(timeout_s)]
    positions = [place.position for place in places.values()]
    if len(overdue) == len(places):
        return [rank for rank in overdue if places[rank].position == min(positions)]
    return [rank for rank in overdue if places[rank].position < max(positions)]


def describe_places(places: Mapping[int, Place], stuck: Sequence[int], names: Mapping[int, str]) -> str:
    """Return in words which ranks are stuck and where, and where the others are."""
    groups: dict[tuple[bool, str, str], list[int]] = {}
    for rank, place in places.items():
        groups.setdefault((rank not in stuck, place.phase, place.line), []).append(rank)
    texts = []
    for (is_other, phase, line), ranks in sorted(groups.items(), key=lambda item: (item[0][0], len(item[1])))[:4]:
        named = ", ".join(f"rank {rank}" + ("" if is_other else f" ({names[rank]})") for rank in ranks[:4])
        more = f" and {len(ranks) - 4} more" if len(ranks) > 4 else ""
        still = "" if is_other else f" not moved for {min(places[rank].still_s for rank in ranks):.0f} s,"
        texts.append(f"{named}{more}:{still} in {phase} ({line})")
    return "; ".join(texts)
