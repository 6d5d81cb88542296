"""Exchange heartbeats between ranks. If a rank dies or hangs, the other ranks print which rank it is, and exit."""

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pipeline.distributed.error_messages import print_error, report
from pipeline.distributed.failure import failures_reported, lost_rank_error, timeouts_recorded
from pipeline.distributed.flight_recorder import report_collectives
from pipeline.distributed.lost_ranks import INTERVAL_S, LOST_STORE, find_lost
from pipeline.distributed.main_thread import MainThread, Place
from pipeline.distributed.rank_records import NAMED_RANKS, RankRecords, Verdict
from pipeline.distributed.rendezvous import connecting
from pipeline.distributed.signals import SignalThread
from pipeline.distributed.stuck_ranks import describe_places, find_stuck
from pipeline.distributed.world import World
from pipeline.errors import Interrupted, LostRankError

_OVERDUE = "overdue"
#: A rank that must end prints its reason for at most this long, because nobody may read its standard error.
_EXPLAIN_S = 20.0


class Heartbeat:
    """Sends the heartbeat of this rank to a key-value store every second, and watches the heartbeats of other ranks.

    A heartbeat says what the main thread is doing (see ``Place``). Rank 0 watches all other ranks. The other ranks
    watch only rank 0. A rank is lost if it is silent for ``timeout_s`` seconds or stuck (see ``find_stuck``). All
    ranks then print which rank is lost, and exit.

    A separate thread does this work, because the main thread may wait in a collective. If the store does not answer, a
    second thread ends the process.

    Args:
        flight_records: a folder for torch's flight recorder, or None. Each rank saves its flight recorder before it
            exits.
    """

    def __init__(self, world: World, timeout_s: float, flight_records: Path | None = None) -> None:
        self._world = world
        self.rank, self.size = world.rank, world.size
        self.timeout_s = timeout_s
        self._flight_records = flight_records
        self._main_thread = MainThread(world.progress, is_patient=world.device.type == "mps")  # waits use no CPU time
        self._records = RankRecords(world)
        self._records.introduce(self.rank)
        watched = [0] if self.rank else list(range(1, self.size))
        self._heard: dict[int, bytes | None] = dict.fromkeys(watched)  # the newest heartbeat of each watched rank
        self._silent_s = dict.fromkeys(watched, 0.0)
        self._stopped = threading.Event()
        self._unanswered_s = 0.0  # the time since the last answer of the store
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
        self._guard = threading.Thread(target=self._watch_store, name="heartbeat-guard", daemon=True)

    def start(self) -> None:
        """Start the threads. Call this after a barrier, so that every rank has already created a ``Heartbeat``."""
        self._thread.start()
        self._guard.start()

    def stop(self) -> None:
        """Stop the threads. Call this after a barrier, because a rank that stops too early counts as lost."""
        self._stopped.set()

    @contextmanager
    def explaining_sigterm(self) -> Iterator[None]:
        """Return a context manager. After SIGTERM inside its block, the process prints which rank is lost, and ends.

        A launcher that finds a dead rank sends SIGTERM to all other ranks.
        """
        if self.size == 1:
            yield
            return
        thread = SignalThread(self._end_after_sigterm)
        thread.start()
        before = signal.signal(signal.SIGTERM, handler := lambda *_: None)
        try:
            yield
        finally:
            if signal.getsignal(signal.SIGTERM) is handler:  # StopRequest may have replaced it for good
                signal.signal(signal.SIGTERM, before)
            thread.stop()

    def _end_after_sigterm(self, number: int) -> None:
        """End the process from this thread, because the main thread may wait for a lost rank forever."""
        if number != signal.SIGTERM:
            return
        lost = find_lost(self._world)
        if self._stopped.wait(INTERVAL_S):  # the main thread has reported an error
            return
        stopped = Interrupted("SIGTERM received: stopped", signal.SIGTERM)
        os._exit(report(lost_rank_error(lost, self._world) if lost else stopped))

    def _run(self) -> None:
        for number, turn_s in enumerate(self._turns()):
            if verdict := self.take_turn(number, turn_s):
                self._exit(verdict)

    def take_turn(self, number: int, elapsed_s: float) -> Verdict | None:
        """Send a heartbeat and read those of the watched ranks. Return why the run must end, or None if it continues.

        Args:
            number: a number that changes in each turn, because a rank with an unchanged heartbeat counts as silent.
        """
        try:
            place = self._main_thread.observe(elapsed_s)
            # Rank 0 parses the places only if a rank is overdue, because thousands of them take long.
            state = _OVERDUE if place.is_overdue(self.timeout_s) else "healthy"
            self._records.write_beat(self.rank, f"{number} {state} {place.to_json()}")
            published, beats = self._records.read_verdict_and_beats(list(self._heard))
            for (rank, previous), beat in zip(self._heard.items(), beats, strict=True):
                self._silent_s[rank] = self._silent_s[rank] + elapsed_s if beat == previous else 0.0
                self._heard[rank] = beat
            self._unanswered_s = 0.0
            if published:
                self._world.ending.verdict = published.reason  # the store may end before the main thread reads it
            return published or self._judge(place)
        except RuntimeError:
            return Verdict(LOST_STORE)

    def _turns(self) -> Iterator[float]:
        """Yield about once per second. The value is the time since the previous yield, in seconds.

        The value is at most 2. A longer pause means that this process was suspended, and other ranks must not count as
        silent for this time.
        """
        last_turn = time.monotonic()
        while not self._stopped.wait(INTERVAL_S):
            now = time.monotonic()
            yield min(now - last_turn, 2 * INTERVAL_S)
            last_turn = now

    def _judge(self, own: Place) -> Verdict | None:
        """Return the verdict of this rank, or None. Rank 0 publishes its verdict."""
        if silent := [rank for rank, silent_s in self._silent_s.items() if silent_s > self.timeout_s]:
            verdict = Verdict(f"lost {self._records.describe(silent)}, silent for {self.timeout_s:.0f} s")
        elif self.rank or not self._is_any_overdue(own):
            return None
        else:
            places = {0: own, **{rank: _parse_place(beat) for rank, beat in self._heard.items() if beat}}
            stuck = find_stuck(places, self.timeout_s)
            if not stuck:
                return None
            verdict = Verdict(describe_places(places, stuck, self._records.name), tuple(stuck))
        if self.rank == 0:
            self._records.write_verdict(verdict)
        return verdict

    def _is_any_overdue(self, own: Place) -> bool:
        """Return whether a rank is overdue. Returns False until each rank has sent a heartbeat."""
        beats = [beat for beat in self._heard.values() if beat]
        return len(beats) == len(self._heard) and (own.is_overdue(self.timeout_s) or any(map(_is_overdue, beats)))

    def _watch_store(self) -> None:
        """End the process if the store does not answer, because a request could wait forever."""
        for turn_s in self._turns():
            self._unanswered_s += turn_s
            if self._unanswered_s > self.timeout_s + INTERVAL_S:
                self._exit(Verdict(f"{LOST_STORE}, silent for {self.timeout_s:.0f} s"))

    def _exit(self, verdict: Verdict) -> None:
        """End the process, after a delay in which the other ranks read the verdict from the store.

        A rank that has also failed has ``timeout_s`` more seconds to print its own error and to finish a save.
        """
        if self._stopped.wait(3 * INTERVAL_S):
            return
        if self._world.ending.has_failed and self._stopped.wait(self.timeout_s):
            return
        explaining = threading.Thread(target=self._explain, args=(verdict,), daemon=True)
        explaining.start()
        explaining.join(_EXPLAIN_S)
        os._exit(LostRankError.exit_status)

    def _explain(self, verdict: Verdict) -> None:
        with suppress(OSError):
            sys.stdout.flush()
        if self.rank in verdict.stuck[:NAMED_RANKS]:
            print_error(f"[rank {self.rank}] the main thread is stuck here:\n{self._main_thread.stack()}")
        report_collectives(self._flight_records, self.rank)
        report(lost_rank_error(verdict.reason, self._world))


@contextmanager
def heartbeat(world: World, timeout_s: float, flight_records: Path | None = None) -> Iterator[None]:
    """Return a context manager that watches all ranks.

    If a rank is lost (silent or stuck, see ``Heartbeat``), all ranks print which rank is lost, and exit. At the end of
    the block, each rank waits for all other ranks.

    Args:
        timeout_s: a rank is silent if it sends no heartbeat for this number of seconds.
        flight_records: a folder for torch's flight recorder, or None. Each rank saves its flight recorder if a rank is
            lost or a collective times out.
    """
    watch = Heartbeat(world, timeout_s, flight_records)
    with watch.explaining_sigterm():
        with connecting(world.rank):  # Gloo may connect only in this first collective
            world.barrier()
        watch.start()
        try:
            with failures_reported(world), timeouts_recorded(world, flight_records):
                yield
                world.barrier()
        finally:
            watch.stop()


def _is_overdue(beat: bytes) -> bool:
    return beat.split(b" ", 2)[1] == _OVERDUE.encode()


def _parse_place(beat: bytes) -> Place:
    return Place(**json.loads(beat.split(b" ", 2)[2]))
