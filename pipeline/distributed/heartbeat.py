"""Exchange heartbeats between ranks. If a rank dies or hangs, the other ranks print which rank it is, and exit."""

import json
import os
import signal
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TypeVar

from torch._C._distributed_c10d import Store
from torch.distributed import DistError, DistStoreError

from data_tools.errors import UserError
from pipeline.distributed.failure import report, summarize
from pipeline.distributed.flight_recorder import report_collectives
from pipeline.distributed.progress import NAMED_RANKS, MainThread, Place, describe_places, find_stuck
from pipeline.distributed.signals import SignalThread
from pipeline.distributed.world import World
from pipeline.errors import Interrupted, LostRankError

Result = TypeVar("Result")

INTERVAL_S = 1.0
#: A failed rank waits at most this long for the store, because the process of the store may be dead.
_STORE_TIMEOUT_S = 10.0
#: A search takes three seconds. A rank waits at most this long for another rank's search, and then searches itself.
#: Must be less than ``_STORE_TIMEOUT_S``.
_SEARCH_TIMEOUT_S = 4.5
_VERDICT = "verdict"
#: The id of the newest search for the lost ranks, and the answer for all ranks.
_SEARCH, _FOUND = "search", "found"
_OVERDUE = "overdue"
_LOST_STORE = "lost rank 0, or the launcher on its node"
_CURE = "; run the same command again (training continues from the last checkpoint)"


@dataclass(frozen=True)
class Verdict:
    """The reason why the run ends, such as a lost rank. All ranks read it from the store."""

    reason: str
    stuck: tuple[int, ...] = ()  # the ranks whose main thread is stuck


class Heartbeat:
    """Sends the heartbeat of this rank to a key-value store every second, and watches the heartbeats of other ranks.

    A heartbeat says what the main thread is doing (see ``Place``). Rank 0 watches all other ranks. The other ranks
    watch only rank 0. A rank is lost if it is silent for ``timeout_s`` seconds or stuck (see ``find_stuck``). All
    ranks then print which rank is lost, and exit.

    A separate thread does this work, because the main thread may wait in a collective. If the store does not answer, a
    second thread ends the process.

    Args:
        records: a folder for torch's flight recorder, or None. Each rank saves its flight recorder before it exits.
    """

    def __init__(self, world: World, timeout_s: float, records: Path | None = None) -> None:
        self._world = world
        self.rank, self.size = world.rank, world.size
        self.timeout_s = timeout_s
        self._records = records
        self._main_thread = MainThread(world.progress, is_patient=world.device.type == "mps")  # waits use no CPU time
        self._store = _connect(world)
        self._store.set(f"name_{self.rank}", f"{socket.gethostname()}, pid {os.getpid()}")
        self._store.set(f"beat_{self.rank}", "")
        if self.rank == 0:
            self._store.set(_VERDICT, "")
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
        os._exit(report(LostRankError(lost + _CURE) if lost else stopped))

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
            self._store.set(_beat_key(self.rank), f"{number} {state} {place.to_json()}")
            published, *beats = self._store.multi_get([_VERDICT, *map(_beat_key, self._heard)])
            for (rank, previous), beat in zip(self._heard.items(), beats, strict=True):
                self._silent_s[rank] = self._silent_s[rank] + elapsed_s if beat == previous else 0.0
                self._heard[rank] = beat
            self._unanswered_s = 0.0
            return _parse_verdict(published) or self._judge(place)
        except RuntimeError:
            return Verdict(_LOST_STORE)

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
            verdict = Verdict(f"lost {_describe(self._store, silent)}, silent for {self.timeout_s:.0f} s")
        elif self.rank or not self._is_any_overdue(own):
            return None
        else:
            places = {0: own, **{rank: _parse_place(beat) for rank, beat in self._heard.items() if beat}}
            stuck = find_stuck(places, self.timeout_s)
            if not stuck:
                return None
            verdict = Verdict(describe_places(places, stuck, lambda rank: _name(self._store, rank)), tuple(stuck))
        if self.rank == 0:
            _write_verdict(self._store, verdict)
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
                self._exit(Verdict(f"{_LOST_STORE}, silent for {self.timeout_s:.0f} s"))

    def _exit(self, verdict: Verdict) -> None:
        """End the process, after a delay in which the other ranks read the verdict from the store."""
        if self._stopped.wait(3 * INTERVAL_S):
            return
        sys.stdout.flush()
        if self.rank in verdict.stuck[:NAMED_RANKS]:
            print(f"[rank {self.rank}] the main thread is stuck here:\n{self._main_thread.stack()}", file=sys.stderr)
        report_collectives(self._records, self.rank)
        os._exit(report(LostRankError(verdict.reason + _CURE)))


@contextmanager
def heartbeat(world: World, timeout_s: float, records: Path | None = None) -> Iterator[None]:
    """Return a context manager that watches all ranks.

    If a rank is lost (silent or stuck, see ``Heartbeat``), all ranks print which rank is lost, and exit. At the end of
    the block, each rank waits for all other ranks.

    Args:
        timeout_s: a rank is silent if it sends no heartbeat for this number of seconds.
        records: a folder for torch's flight recorder, or None. Each rank saves its flight recorder if a rank is lost or
            a collective times out.
    """
    watch = Heartbeat(world, timeout_s, records)
    with watch.explaining_sigterm():
        world.barrier()
        watch.start()
        try:
            with failures_reported(world), _timeouts_recorded(world, records):
                yield
                world.barrier()
        finally:
            watch.stop()


@contextmanager
def _timeouts_recorded(world: World, records: Path | None) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if _may_come_from_a_collective(error) and "timed out" in str(error).lower():
            report_collectives(records, world.rank)
        raise


def _may_come_from_a_collective(error: Exception) -> bool:
    return type(error) is RuntimeError or isinstance(error, DistError)  # other errors are subclasses of RuntimeError


@contextmanager
def failures_reported(world: World) -> Iterator[None]:
    """Return a context manager that prints an error of its block, and reports it to the other ranks.

    The error is printed before any cleanup code runs, because cleanup may wait for the other ranks.

    Raises:
        LostRankError: a collective failed because another rank is lost.
    """
    try:
        yield
    except (UserError, KeyboardInterrupt) as error:
        if world.size > 1:
            report(error)
        raise
    except Exception as error:
        if world.size == 1:
            raise
        if _may_come_from_a_collective(error) and (lost := find_lost(world)):
            lost_rank = LostRankError(lost + _CURE)
            report(lost_rank)
            raise lost_rank from error
        report(error)
        reason = summarize(error)
        _within_store_timeout(lambda: _publish_failure(world, reason), None)
        raise


def find_lost(world: World) -> str | None:
    """Return a text that names the lost ranks, or None if no rank is lost.

    A rank is lost if it has failed or sends no heartbeat during this call. The call takes a few seconds.

    The first rank that makes this call reads the heartbeats, and the other ranks wait for the result. If no result
    arrives in time, one of the waiting ranks reads the heartbeats.
    """
    search, found = "", None
    deadline = time.monotonic() + 2 * _STORE_TIMEOUT_S
    while found is None:
        if time.monotonic() > deadline:
            return _LOST_STORE
        otherwise: tuple[str, str | None] = (search, _LOST_STORE)
        search, found = _within_store_timeout(partial(_search_or_wait, world, search), otherwise)
    return found or None


def _search_or_wait(world: World, given_up: str) -> tuple[str, str | None]:
    """Search for the lost ranks, or wait until another rank has found them.

    Args:
        given_up: the id of the search for which this rank has waited too long, or "".

    Returns:
        The id of the newest search, and a text that names the lost ranks. The text is "" if no rank is lost, and None
        if the search is not finished.
    """
    store = _connect(world)
    own = uuid.uuid4().hex
    search = store.compare_set(_SEARCH, given_up, own).decode()  # only one rank can replace an id
    if search != own:
        with suppress(DistStoreError):
            store.wait([_FOUND], timedelta(seconds=_SEARCH_TIMEOUT_S))
    elif not store.check([_FOUND]):
        lost = _search_for_lost(store, world)
        if not store.check([_FOUND]):
            store.set(_FOUND, f"lost {_describe(store, lost)}" if lost else "")
    if verdict := _read_verdict(store):
        return search, verdict.reason
    return search, store.get(_FOUND).decode() if store.check([_FOUND]) else None


def _search_for_lost(store: Store, world: World) -> list[int]:
    others = [rank for rank in range(world.size) if rank != world.rank]
    keys = list(map(_beat_key, others))
    before = store.multi_get(keys) if keys else []
    time.sleep(3 * INTERVAL_S)
    after = store.multi_get(keys) if keys else []
    return [rank for rank, was, now in zip(others, before, after, strict=True) if was == now]


def _publish_failure(world: World, reason: str) -> None:
    """Tell the other ranks that this rank has failed, because they may wait for this rank in a collective."""
    store = _connect(world)
    if not _read_verdict(store):
        _write_verdict(store, Verdict(f"lost {_describe(store, [world.rank])}, which failed: {reason}"))
        time.sleep(2 * INTERVAL_S)  # the other ranks read the verdict before this process ends, maybe with the store


def _connect(world: World) -> Store:
    return world.connect_to_store("heartbeat")


def _write_verdict(store: Store, verdict: Verdict) -> None:
    store.set(_VERDICT, json.dumps(asdict(verdict)))


def _read_verdict(store: Store) -> Verdict | None:
    return _parse_verdict(store.get(_VERDICT)) if store.check([_VERDICT]) else None


def _parse_verdict(text: bytes) -> Verdict | None:
    return Verdict(**json.loads(text)) if text else None


def _beat_key(rank: int) -> str:
    return f"beat_{rank}"


def _is_overdue(beat: bytes) -> bool:
    return beat.split(b" ", 2)[1] == _OVERDUE.encode()


def _parse_place(beat: bytes) -> Place:
    return Place(**json.loads(beat.split(b" ", 2)[2]))


def _describe(store: Store, ranks: list[int]) -> str:
    named = [f"rank {rank} ({_name(store, rank)})" for rank in ranks[:NAMED_RANKS]]
    more = f" and {len(ranks) - NAMED_RANKS} more" if len(ranks) > NAMED_RANKS else ""
    return ", ".join(named) + more


def _name(store: Store, rank: int) -> str:
    return store.get(f"name_{rank}").decode()


def _within_store_timeout(request: Callable[[], Result], otherwise: Result) -> Result:
    """Return the result of requests to the store. If the store does not answer in time, return ``otherwise``."""
    results = [otherwise]

    def call() -> None:
        with suppress(RuntimeError):  # the process with the store has ended
            results[0] = request()

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(_STORE_TIMEOUT_S)
    return results[0]
