"""Exchange heartbeats between ranks. If a rank dies or hangs, the other ranks print which rank is lost, and exit."""

import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

from torch._C._distributed_c10d import Store
from torch.distributed import DistError

from data_tools.errors import UserError
from pipeline.distributed.failure import report, summarize
from pipeline.distributed.flight_recorder import report_collectives
from pipeline.distributed.progress import MainThread, Place, describe_places, find_stuck
from pipeline.distributed.signals import SignalThread
from pipeline.distributed.world import World
from pipeline.errors import Interrupted, LostRankError

Result = TypeVar("Result")

INTERVAL_S = 1.0
#: The longest time that a failed rank waits for answers of the store, whose process or host may be dead.
_STORE_TIMEOUT_S = 10.0
_VERDICT = "verdict"
_LOST_STORE = "lost rank 0, or the launcher on its node"
_CURE = "; run the same command again (training continues from the last checkpoint)"


@dataclass(frozen=True)
class Verdict:
    """The reason why the run ends, such as a lost rank. One rank writes it to the store for all other ranks."""

    reason: str
    stuck: tuple[int, ...] = ()  # the ranks whose main thread is stuck


class Heartbeat:
    """Writes this rank's heartbeat to a key-value store every second, and reads the heartbeats of other ranks.

    A heartbeat says what the main thread of the rank is doing (see ``Place``). Rank 0 watches all other ranks. The
    other ranks watch only rank 0. They read from the store whether rank 0 has ended the run, and why.

    A rank is lost if it has sent no heartbeat for ``timeout_s`` seconds, or if it is stuck (see ``find_stuck``). Each
    remaining rank then prints which rank is lost, and ends its process with ``LostRankError.exit_status``. A separate
    thread does all this, because the main thread may be waiting in a collective. If the store does not answer, a second
    thread ends the process.

    Args:
        records: before the process ends, each rank writes torch's flight recorder to this folder. If None, it writes
            nothing.
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
        self._stopped = threading.Event()
        self._unanswered_s = 0.0  # the time since the last answer of the store
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
        self._guard = threading.Thread(target=self._watch_store, name="heartbeat-guard", daemon=True)

    def start(self) -> None:
        """Start the threads. Before this call, wait in a barrier until every rank has created its ``Heartbeat``."""
        self._thread.start()
        self._guard.start()

    def stop(self) -> None:
        """Stop the threads. Before this call, all ranks must pass a barrier. Until then, they expect heartbeats."""
        self._stopped.set()

    @contextmanager
    def explaining_sigterm(self) -> Iterator[None]:
        """Return a context manager that handles SIGTERM inside its ``with`` block.

        When a launcher finds a dead rank, it sends SIGTERM to all other ranks. A process that receives SIGTERM inside
        the block prints which rank is lost, and ends.
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
        """End the process from another thread, because the main thread may wait for a lost rank without a limit."""
        if number != signal.SIGTERM:
            return
        lost = find_lost(self._world)
        if self._stopped.wait(INTERVAL_S):  # the main thread has reported an error
            return
        stopped = Interrupted("SIGTERM received: stopped", signal.SIGTERM)
        os._exit(report(LostRankError(lost + _CURE) if lost else stopped))

    def _run(self) -> None:
        watched = [0] if self.rank else list(range(1, self.size))
        heard: dict[int, str] = {}
        silent_s = dict.fromkeys(watched, 0.0)
        for beat, turn_s in enumerate(self._turns()):
            try:
                place = self._main_thread.observe(turn_s)
                self._store.set(f"beat_{self.rank}", f"{beat} {place.to_json()}")
                for rank, text in _beats(self._store, watched).items():
                    silent_s[rank] = silent_s[rank] + turn_s if heard.get(rank) == text else 0.0
                    heard[rank] = text
                self._unanswered_s = 0.0
                silent = [rank for rank in watched if silent_s[rank] > self.timeout_s]
                verdict = self._judge(place, heard, silent)
            except RuntimeError:
                verdict = Verdict(_LOST_STORE)
            if verdict:
                self._exit(verdict)

    def _turns(self) -> Iterator[float]:
        """Yield the time since the last turn, at most two seconds. Yields every second until ``stop`` is called.

        If more time has passed, this process was suspended. The rest of the time must not count against other ranks.
        """
        last_turn = time.monotonic()
        while not self._stopped.wait(INTERVAL_S):
            now = time.monotonic()
            yield min(now - last_turn, 2 * INTERVAL_S)
            last_turn = now

    def _judge(self, own: Place, heard: dict[int, str], silent: list[int]) -> Verdict | None:
        """Return the verdict in the store. If the store has no verdict, return the verdict of this rank, or None."""
        if self._store.check([_VERDICT]):
            return _read_verdict(self._store)
        if silent:
            verdict = Verdict(f"lost {_describe(self._store, silent)}, silent for {self.timeout_s:.0f} s")
        elif self.rank or not all(heard.values()):
            return None
        else:
            places = {0: own, **{rank: Place(**json.loads(beat.partition(" ")[2])) for rank, beat in heard.items()}}
            stuck = find_stuck(places, self.timeout_s)
            if not stuck:
                return None
            names = {rank: _name(self._store, rank) for rank in stuck}
            verdict = Verdict(describe_places(places, stuck, names), tuple(stuck))
        if self.rank == 0:
            _write_verdict(self._store, verdict)
        return verdict

    def _watch_store(self) -> None:
        """End the process if the store does not answer. Otherwise, requests to the store could wait without a limit."""
        for turn_s in self._turns():
            self._unanswered_s += turn_s
            if self._unanswered_s > self.timeout_s + INTERVAL_S:
                self._exit(Verdict(f"{_LOST_STORE}, silent for {self.timeout_s:.0f} s"))

    def _exit(self, verdict: Verdict) -> None:
        """End the process after a delay in which the other ranks can read the same verdict from the store."""
        if self._stopped.wait(3 * INTERVAL_S):
            return
        sys.stdout.flush()
        if self.rank in verdict.stuck:
            print(f"[rank {self.rank}] the main thread is stuck here:\n{self._main_thread.stack()}", file=sys.stderr)
        report_collectives(self._records, self.rank)
        os._exit(report(LostRankError(verdict.reason + _CURE)))


@contextmanager
def heartbeat(world: World, timeout_s: float, records: Path | None = None) -> Iterator[None]:
    """Return a context manager that watches all ranks inside its ``with`` block.

    If a rank sends no heartbeat or is stuck, all other ranks print which rank it is, and exit. At the end of the block,
    each rank waits for all other ranks. If the block raises an error, the error is printed at once (see
    ``failures_reported``).

    Args:
        timeout_s: a rank that sends no heartbeat for this number of seconds is lost.
        records: a folder for torch's flight recorder. If a rank is lost or if a collective times out, each rank writes
            a file to this folder, and prints one line about its collectives. If None, it does neither.
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
    """Return a context manager that saves torch's flight recorder if a collective times out in its ``with`` block."""
    try:
        yield
    except Exception as error:
        if _may_come_from_a_collective(error) and "timed out" in str(error).lower():
            report_collectives(records, world.rank)
        raise


def _may_come_from_a_collective(error: Exception) -> bool:
    """Return whether torch raises errors of this type if a collective fails."""
    return type(error) is RuntimeError or isinstance(error, DistError)  # other errors are subclasses of RuntimeError


@contextmanager
def failures_reported(world: World) -> Iterator[None]:
    """Return a context manager that prints the error that its ``with`` block raises, and reports it to the other ranks.

    The error is printed before any cleanup code runs, because cleanup code may wait for the other ranks.

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
    """Return a text that names the lost ranks. If no rank is lost, return None.

    A rank is lost if it has failed, or if it sends no heartbeat during this call, which takes a few seconds.
    """
    otherwise: str | None = _LOST_STORE
    return _within_store_timeout(lambda: _find_lost(world), otherwise)


def _find_lost(world: World) -> str | None:
    store = _connect(world)
    others = [rank for rank in range(world.size) if rank != world.rank]
    before = _beats(store, others)
    time.sleep(3 * INTERVAL_S)
    if store.check([_VERDICT]):
        return _read_verdict(store).reason
    after = _beats(store, others)
    silent = [rank for rank in others if before[rank] == after[rank]]
    return f"lost {_describe(store, silent)}" if silent else None


def _publish_failure(world: World, reason: str) -> None:
    """Tell the other ranks that this rank has failed, because they may wait in a collective without a limit."""
    store = _connect(world)
    if not store.check([_VERDICT]):
        _write_verdict(store, Verdict(f"lost {_describe(store, [world.rank])}, which failed: {reason}"))
        time.sleep(2 * INTERVAL_S)  # the other ranks read the verdict before this process ends, maybe with the store


def _connect(world: World) -> Store:
    return world.connect_to_store("heartbeat")


def _write_verdict(store: Store, verdict: Verdict) -> None:
    store.set(_VERDICT, json.dumps(asdict(verdict)))


def _read_verdict(store: Store) -> Verdict:
    return Verdict(**json.loads(store.get(_VERDICT)))


def _beats(store: Store, ranks: list[int]) -> dict[int, str]:
    beats = store.multi_get([f"beat_{rank}" for rank in ranks]) if ranks else []
    return {rank: beat.decode() for rank, beat in zip(ranks, beats, strict=True)}


def _describe(store: Store, ranks: list[int]) -> str:
    return ", ".join(f"rank {rank} ({_name(store, rank)})" for rank in ranks)


def _name(store: Store, rank: int) -> str:
    return store.get(f"name_{rank}").decode()


def _within_store_timeout(request: Callable[[], Result], otherwise: Result) -> Result:
    """Return the result of requests to the store, or ``otherwise`` if the store does not answer in time."""
    results = [otherwise]

    def call() -> None:
        with suppress(RuntimeError):  # the process with the store has ended
            results[0] = request()

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(_STORE_TIMEOUT_S)
    return results[0]
