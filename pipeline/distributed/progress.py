"""Record the progress of each rank's main thread, and find stuck ranks.

All ranks pass the same marks in the same order: the phases of a run, micro-batches, and collectives. The position of a
rank is the number of marks that it has passed. A rank moves if it passes a mark or uses CPU time. A rank that waits
for another rank in a collective does not move. A rank that waits for a dead file system does not move, either.
``find_stuck`` therefore compares the ranks.
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

#: The longest time without a move in a phase that can wait without using CPU time: for a compiler, a download, a disk.
PATIENCE_S = 600.0
#: A thread uses less than this share of a core if it only polls.
_LEAST_CPU_SHARE = 0.01


class Progress:
    """The current phase of a rank. The main thread sets the phase, and the heartbeat's thread reads the phase."""

    def __init__(self) -> None:
        self.position = 0
        self.phase = "start"
        self.is_patient = True
        self.moves = 0

    def reach(self, phase: str, *, is_patient: bool = False) -> None:
        """Begin a phase. All ranks must make the same calls in the same order.

        Args:
            is_patient: whether a healthy rank may wait for minutes in this phase without using CPU time.
        """
        self.phase, self.is_patient = phase, is_patient
        self.pass_mark()

    def pass_mark(self) -> None:
        """Count a mark within the phase that all ranks pass, such as a collective."""
        self.position += 1

    def move(self) -> None:
        """Count a move that the other ranks need not make."""
        self.moves += 1


@dataclass(frozen=True)
class Place:
    """The place of a rank's main thread, and the time since the thread has moved."""

    position: int
    phase: str
    is_patient: bool
    still_s: float
    line: str  # the current line of source code

    def to_json(self) -> str:
        """Return the place as JSON text, to send to another rank."""
        return json.dumps(asdict(self))

    def is_overdue(self, timeout_s: float) -> bool:
        """Return whether the time since the last move is longer than the phase allows."""
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
        """Return the place of the thread.

        Args:
            elapsed_s: the time since the last call, without the time in which the process was suspended.
        """
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
        """Return the CPU time of the thread. If other threads may work, return that of the process."""
        if self._progress.is_patient or not hasattr(time, "pthread_getcpuclockid"):
            return time.process_time() - time.thread_time()  # without the time of the thread that observes
        return time.clock_gettime(time.pthread_getcpuclockid(self._thread_id))

    def _line(self) -> str:
        """Return the current line in code of this project, and the current line in any code."""
        innermost = frame = sys._current_frames().get(self._thread_id)
        while frame and not frame.f_globals.get("__name__", "").startswith(("pipeline.", "data_tools.")):
            frame = frame.f_back
        frames = [each for each in (frame, innermost) if each]
        return " > ".join(dict.fromkeys(map(_describe_frame, frames)))


def _describe_frame(frame: FrameType) -> str:
    return f"{os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno} in {frame.f_code.co_name}"


def find_stuck(places: Mapping[int, Place], timeout_s: float) -> list[int]:
    """Return the ranks that are stuck. Returns an empty list if the run is healthy.

    A rank is overdue if it has not moved for longer than its phase allows. An overdue rank is stuck if another rank has
    passed more marks. If all ranks are overdue, the ranks that have passed the fewest marks are stuck.
    """
    overdue = [rank for rank, place in places.items() if place.is_overdue(timeout_s)]
    positions = [place.position for place in places.values()]
    if len(overdue) == len(places):
        return [rank for rank in overdue if places[rank].position == min(positions)]
    return [rank for rank in overdue if places[rank].position < max(positions)]


def describe_places(places: Mapping[int, Place], stuck: Sequence[int], names: Mapping[int, str]) -> str:
    """Return a text with the names and places of the stuck ranks, and the places of the other ranks."""
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
