"""The simulated ranks of one process. ``benchmarks.control_plane.store`` starts this module.

The calls are those of ``pipeline.distributed``. Two things differ from a run. A few threads send the heartbeats
of all ranks. The simulated main threads never move: each one stays at the same place in the code.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore

from benchmarks.control_plane.store import TIMEOUT
from pipeline.checkpoint.layout import tensor_file
from pipeline.checkpoint.manifest import FileEntry, Files
from pipeline.checkpoint.mirror import Mirror
from pipeline.distributed.heartbeat import Heartbeat
from pipeline.distributed.lost_ranks import INTERVAL_S, find_lost
from pipeline.distributed.main_thread import Place
from pipeline.distributed.network_interface import choose_gloo_interface
from pipeline.distributed.rendezvous import open_store
from pipeline.distributed.world import World

UPLOAD_TIMEOUT_S = 600.0
SENDERS = 8  # threads that send the heartbeats of all ranks of this process
STACK_BYTES = 512 << 10  # of a thread, because there are thousands
REQUESTS = ("set", "get", "check", "wait", "add", "compare_set", "multi_get", "multi_set")
PLACE = Place(1000, "step 7, micro-batch 1 of 4", False, 0.0, "gpt2.py:180 in loss > functional.py:2500 in linear")


class Uploader(Mirror):
    """A mirror that takes part in each upload round, but uploads nothing."""

    def _upload_share(self, step: int, files: Files) -> str:
        return ""


class Observer:
    """Replaces ``MainThread``: the main thread is always at ``PLACE``."""

    def observe(self, elapsed_s: float) -> Place:
        return PLACE


class RequestCounter:
    """Counts requests to stores: those of all ranks in this process, and separately those of rank 0."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.requests = 0
        self.of_rank_0 = 0
        self.local = threading.local()
        for name in REQUESTS:
            setattr(Store, name, self._count(getattr(Store, name)))

    def _count(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            with self._lock:
                self.requests += 1
                self.of_rank_0 += getattr(self.local, "is_rank_0", False)
            return method(*args, **kwargs)

        return call


class Ranks:
    """The ranks ``begin`` to ``end - 1`` of ``size`` ranks."""

    def __init__(self, size: int, begin: int, end: int, seconds: float, timeout_s: float) -> None:
        self.size = size
        self.numbers = range(begin, end)
        self.seconds, self.timeout_s = seconds, timeout_s
        self.counter = RequestCounter()
        self.worlds: list[World] = []
        self.heartbeats: list[Heartbeat] = []
        self.uploaders: list[Uploader] = []
        self.turn = 0
        self.turn_cpu_s_of_rank_0: list[float] = []

    def start(self) -> dict[str, float]:
        """Connect all ranks to each other, as ``join_world`` does before it creates torch's process group."""
        self.counter.requests = 0
        seconds = self._on_all_ranks(self._join)
        self.worlds.sort(key=lambda world: world.rank)
        return {"seconds": seconds, "requests_of_rank_0": float(self.counter.of_rank_0)}

    def _join(self, rank: int) -> None:
        self.counter.local.is_rank_0 = rank == 0
        store = open_store(rank, self.size, TIMEOUT)
        choose_gloo_interface(PrefixStore("interface", store), rank, self.size)
        self.worlds.append(World(rank, self.size, rank % 8, torch.device("cpu"), store))

    def watch(self) -> dict[str, float]:
        self._on_all_ranks(lambda rank: self.heartbeats.append(Heartbeat(self._world(rank), self.timeout_s)))
        self.heartbeats.sort(key=lambda heartbeat: heartbeat.rank)
        for heartbeat in self.heartbeats:
            heartbeat._main_thread = Observer()  # type: ignore[assignment]
        return {}

    def beats(self) -> dict[str, float]:
        started, until = time.monotonic(), time.monotonic() + self.seconds
        late_s = 0.0
        with ThreadPoolExecutor(SENDERS) as threads:
            while time.monotonic() < until:
                late_s = max(late_s, self._take_turns(threads, self.heartbeats))
        turns = sorted(self.turn_cpu_s_of_rank_0)
        return {
            "seconds": time.monotonic() - started,
            "longest_round_s": late_s,
            "turn_cpu_s_of_rank_0": turns[len(turns) // 2] if turns else 0.0,
        }

    def mirror(self) -> dict[str, float]:
        for world in self.worlds:
            self.uploaders.append(Uploader("memory://run", Path("run"), world, keep_last=1, timeout_s=UPLOAD_TIMEOUT_S))
        return {}

    def upload(self) -> dict[str, float]:
        """Upload one checkpoint with two files per rank, as after a save."""
        started, seconds = time.monotonic(), 0.0
        followers = self.uploaders[self.numbers.start == 0 :]
        for uploader in followers:
            uploader.start()
        if self.numbers.start == 0:
            names = [tensor_file(rank, group) for rank in range(self.size) for group in ("weights", "moments")]
            rounds = self.uploaders[0]._rounds
            rounds.begin(1, {name: FileEntry(1 << 20, "0" * 64) for name in names})
            problems = rounds.collect()
            assert not problems, problems
            seconds = time.monotonic() - started
            rounds.end()
        for uploader in followers:
            uploader._thread.join()
        self.uploaders.clear()
        return {"seconds": seconds}

    def lost(self) -> dict[str, float]:
        """Stop the heartbeats of the last rank. Wait until all other ranks of this process notice this."""
        silent = self.size - 1
        with ThreadPoolExecutor(SENDERS) as threads:
            self._take_turns(threads, self.heartbeats)
        started = time.monotonic()
        waiting = [heartbeat for heartbeat in self.heartbeats if heartbeat.rank != silent]
        ranks, noticed_s = len(waiting), 0.0
        named = 0
        with ThreadPoolExecutor(SENDERS) as threads:
            while waiting:
                verdicts: dict[int, str] = {}
                self._take_turns(threads, waiting, verdicts)
                named += sum(f"lost rank {silent} (" in reason for reason in verdicts.values())
                waiting = [heartbeat for heartbeat in waiting if heartbeat.rank not in verdicts]
                if 0 in verdicts:
                    noticed_s = time.monotonic() - started
        return {
            "noticed_s": noticed_s,
            "all_noticed_s": time.monotonic() - started,
            "ranks": ranks,
            "named": named,
        }

    def search(self) -> dict[str, float]:
        """On all ranks except the last, ask which rank is lost. A real run asks after SIGTERM from the launcher."""
        stopped = threading.Event()
        sending = threading.Thread(target=self._send_until, args=(stopped,))
        sending.start()
        found: list[str | None] = []
        seconds = self._on_all_ranks(lambda rank: self._search(rank, found))
        stopped.set()
        sending.join()
        ranks = sum(rank != self.size - 1 for rank in self.numbers)
        return {"seconds": seconds, "ranks": ranks, "named": sum(f"rank {self.size - 1} (" in (t or "") for t in found)}

    def _search(self, rank: int, found: list[str | None]) -> None:
        if rank != self.size - 1:
            found.append(find_lost(self._world(rank)))

    def _send_until(self, stopped: threading.Event) -> None:
        others = [heartbeat for heartbeat in self.heartbeats if heartbeat.rank != self.size - 1]
        with ThreadPoolExecutor(SENDERS) as threads:
            while not stopped.is_set():
                self._take_turns(threads, others)

    def _take_turns(
        self, threads: ThreadPoolExecutor, heartbeats: list[Heartbeat], verdicts: dict[int, str] | None = None
    ) -> float:
        """Send one heartbeat of each rank and wait for the next round. Returns the seconds of the round."""
        started = time.monotonic()
        self.turn += 1

        def take_turns(first: int) -> None:
            for heartbeat in heartbeats[first::SENDERS]:
                cpu_s = time.thread_time()
                verdict = heartbeat.take_turn(self.turn, INTERVAL_S)
                if heartbeat.rank == 0:
                    self.turn_cpu_s_of_rank_0.append(time.thread_time() - cpu_s)
                if verdict and verdicts is not None:
                    verdicts[heartbeat.rank] = verdict.reason

        list(threads.map(take_turns, range(SENDERS)))
        seconds = time.monotonic() - started
        time.sleep(max(0.0, INTERVAL_S - seconds))
        return seconds

    def _world(self, rank: int) -> World:
        return self.worlds[rank - self.numbers.start]

    def _on_all_ranks(self, call: Callable[[int], object]) -> float:
        """Make a call on each rank, in one thread per rank. Return the seconds until the last call has returned."""
        failures: list[BaseException] = []

        def guarded(rank: int) -> None:
            try:
                call(rank)
            except Exception as error:  # noqa: BLE001 - raised below
                failures.append(error)

        threads = [threading.Thread(target=guarded, args=(rank,)) for rank in self.numbers]
        started = time.monotonic()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if failures:
            raise failures[0]
        return time.monotonic() - started


def main() -> None:
    """Run each phase when the parent process begins it, and report what was measured."""
    index, size, begin, end, port = map(int, sys.argv[1:6])
    threading.stack_size(STACK_BYTES)
    conductor = TCPStore("localhost", port, None, False, TIMEOUT, wait_for_workers=False)
    get, publish = conductor.get, conductor.set  # these requests are not counted
    ranks = Ranks(size, begin, end, seconds=float(sys.argv[6]), timeout_s=float(sys.argv[7]))
    publish(f"ready_{index}", "{}")
    for phase in (ranks.start, ranks.watch, ranks.beats, ranks.mirror, ranks.upload, ranks.search, ranks.lost):
        get(f"begin_{phase.__name__}")
        before = ranks.counter.requests
        measured = phase()
        measured["requests"] = ranks.counter.requests - before
        publish(f"{phase.__name__}_{index}", json.dumps(measured))


if __name__ == "__main__":
    main()
