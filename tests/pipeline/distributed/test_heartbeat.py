"""A rank that sends no heartbeat is found and named."""

from __future__ import annotations

import errno
import io
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from unittest.mock import Mock

import pytest
import torch
from torch._C._distributed_c10d import HashStore, Store

from pipeline.distributed import heartbeat, lost_ranks
from pipeline.distributed.failure import failures_reported
from pipeline.distributed.heartbeat import Heartbeat
from pipeline.distributed.lost_ranks import find_lost
from pipeline.distributed.world import Ending, World
from pipeline.errors import ConfigError, LostRankError, MainRankError, TrainingError


class SharedStore(HashStore):
    """A store whose clones share its keys, as those of a TCPStore do."""

    def clone(self) -> SharedStore:
        return self


def shorten_interval(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    for module in (heartbeat, lost_ranks):
        monkeypatch.setattr(module, "INTERVAL_S", seconds)


@pytest.fixture
def worlds(monkeypatch: pytest.MonkeyPatch) -> list[World]:
    """Three ranks in this process with a short interval."""
    shorten_interval(monkeypatch, 0.3)
    world = World(0, 3, 0, torch.device("cpu"), SharedStore())
    return [replace(world, rank=rank) for rank in range(3)]


@pytest.fixture
def ranks(worlds: list[World]) -> list[Heartbeat]:
    return [Heartbeat(world, timeout_s=60.0) for world in worlds]


def record_searches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list to which each rank that reads the heartbeats adds its number."""
    readers: list[int] = []
    search = lost_ranks._search_for_lost
    monkeypatch.setattr(lost_ranks, "_search_for_lost", lambda *args: readers.append(args[1].rank) or search(*args))
    return readers


def test_no_rank_is_lost_while_all_send_heartbeats(worlds: list[World], ranks: list[Heartbeat]) -> None:
    for rank in ranks:
        rank.start()
    assert find_lost(worlds[1]) is None
    for rank in ranks:
        rank.stop()


def test_a_broken_connection_between_healthy_ranks_is_one_line(worlds: list[World], ranks: list[Heartbeat]) -> None:
    """The network is back before TCP gives up, so that all ranks still send heartbeats."""
    for rank in ranks:
        rank.start()
    reason = "the network broke a connection between ranks .*Connection timed out"
    with pytest.raises(LostRankError, match=reason), failures_reported(worlds[1]):
        raise RuntimeError("[tcp/pair.cc:553] Read error [10.0.0.2]:3: Connection timed out")
    verdict = ranks[0].take_turn(9, 1.0)
    assert verdict and "which failed: the network broke a connection" in verdict.reason
    for rank in ranks:
        rank.stop()


def test_a_silent_rank_is_named(worlds: list[World], ranks: list[Heartbeat]) -> None:
    for rank in ranks[:2]:
        rank.start()
    lost = find_lost(worlds[0])
    assert lost is not None and lost.startswith("lost rank 2 (") and ", pid " in lost
    for rank in ranks[:2]:
        rank.stop()


@pytest.mark.parametrize(
    ("device", "advice"), [("cpu", "lower batch.micro_batch_size"), ("cuda", "start fewer ranks per host")]
)
def test_a_rank_that_the_kernel_killed_to_free_memory(
    device: str, advice: str, worlds: list[World], ranks: list[Heartbeat]
) -> None:
    kills = "the kernel of node1 has killed 1 process since the start of this command, because memory was short"
    world = replace(worlds[0], device=torch.device(device))
    world.ending.memory_kills = Mock(describe=lambda: kills)
    with pytest.raises(LostRankError) as caught, failures_reported(world):
        raise RuntimeError("Connection closed by peer")
    assert str(caught.value).startswith("lost rank 1 (")
    assert f"; {kills}. " in str(caught.value) and advice in str(caught.value).lower()
    assert ". Then run the same command again" in str(caught.value)


def test_only_one_rank_reads_the_heartbeats_of_all_ranks(
    worlds: list[World], ranks: list[Heartbeat], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A launcher that stops a run sends SIGTERM to all ranks at once."""
    readers = record_searches(monkeypatch)
    with ThreadPoolExecutor(3) as threads:
        found = set(threads.map(find_lost, worlds))
    (lost,) = found
    assert lost is not None and lost.count("rank ") == 2
    assert len(readers) == 1


def test_if_ranks_that_search_are_lost_another_one_takes_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three ranks begin to search one after the other, and each of them dies before it writes the result."""
    shorten_interval(monkeypatch, 0.01)
    monkeypatch.setattr(lost_ranks, "_SEARCH_TIMEOUT_S", 0.2)
    world = World(0, 5, 0, torch.device("cpu"), SharedStore())
    worlds = [replace(world, rank=rank) for rank in range(5)]
    for each in worlds:
        Heartbeat(each, timeout_s=60.0)
    search = lost_ranks._search_for_lost
    died: list[int] = []

    def die_or_search(store: Store, world: World) -> list[int]:
        if len(died) < 3:
            died.append(world.rank)
            raise RuntimeError("this thread ends, as after a lost connection")
        return search(store, world)

    monkeypatch.setattr(lost_ranks, "_search_for_lost", die_or_search)
    with ThreadPoolExecutor(5) as threads:
        found = list(threads.map(find_lost, worlds))
    assert len(set(died)) == 3
    for rank in set(range(5)) - set(died):
        answer = found[rank]
        assert answer is not None and all(f"rank {lost} (" in answer for lost in died)


def test_only_one_rank_takes_over_a_search(
    worlds: list[World], ranks: list[Heartbeat], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 2 dies during its search, and rank 1 during the next one. Rank 0 then waits for rank 1."""
    monkeypatch.setattr(lost_ranks, "_SEARCH_TIMEOUT_S", 0.01)
    readers: list[int] = []

    def die(store: Store, world: World) -> list[int]:
        readers.append(world.rank)
        raise RuntimeError

    monkeypatch.setattr(lost_ranks, "_search_for_lost", die)
    with pytest.raises(RuntimeError):
        lost_ranks._search_or_wait(worlds[2], "")
    search, _ = lost_ranks._search_or_wait(worlds[1], "")
    with pytest.raises(RuntimeError):
        lost_ranks._search_or_wait(worlds[1], search)
    newer, found = lost_ranks._search_or_wait(worlds[0], search)
    assert newer != search and found is None
    assert readers == [2, 1]


def test_a_long_list_of_lost_ranks_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    shorten_interval(monkeypatch, 0.01)
    world = World(0, 100, 0, torch.device("cpu"), SharedStore())
    for rank in range(100):
        Heartbeat(replace(world, rank=rank), timeout_s=60.0)
    lost = find_lost(world)
    assert lost is not None and lost.startswith("lost rank 1 (") and lost.endswith(") and 95 more")


def end_with_silent_rank(ranks: list[Heartbeat], monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Let ranks 0 and 1 find that rank 2 is silent. Return their exit statuses."""
    statuses: list[int] = []

    def stop_thread(status: int) -> None:
        statuses.append(status)
        next(rank for rank in ranks if rank._thread is threading.current_thread()).stop()

    monkeypatch.setattr(heartbeat.os, "_exit", stop_thread)
    for rank in ranks[:2]:
        rank.timeout_s = 3.0
        rank.start()
    for rank in ranks[:2]:
        rank._thread.join(30)
    return statuses


def test_a_silent_rank_ends_the_others(
    ranks: list[Heartbeat], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Rank 0 finds that rank 2 is silent, and rank 1 reads it from the store."""
    assert end_with_silent_rank(ranks, monkeypatch) == [LostRankError.exit_status] * 2
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 2 and all(
        line.startswith("error: lost rank 2 (") and "silent for 3 s" in line for line in lines
    )


class BrokenStream(io.StringIO):
    """A standard error on a full disk or on a closed terminal. Without an error, nobody reads the pipe."""

    def __init__(self, error: OSError | None) -> None:
        super().__init__()
        self._error = error
        self.is_read = threading.Event()

    def write(self, text: str) -> int:
        if self._error:
            raise self._error
        self.is_read.wait(60)
        return len(text)


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), None])
def test_ranks_end_although_they_cannot_print(
    error: OSError | None, ranks: list[Heartbeat], monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = BrokenStream(error)
    monkeypatch.setattr(heartbeat, "_EXPLAIN_S", 0.5)
    monkeypatch.setattr(sys, "stderr", stream)
    try:
        assert end_with_silent_rank(ranks, monkeypatch) == [LostRankError.exit_status] * 2
    finally:
        stream.is_read.set()


@pytest.mark.parametrize(("rank", "other"), [(2, 0), (0, 1)])
def test_the_error_of_one_rank_is_the_reason_on_the_other_ranks(
    worlds: list[World], ranks: list[Heartbeat], rank: int, other: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error of all ranks is no reason, because rank 0 ends by itself after it has finished a save."""
    monkeypatch.setattr("pipeline.distributed.error_messages._OTHER_RANKS_WAIT_S", 0)
    for error in (MainRankError("a mistake", 2), TrainingError("a spike"), ConfigError("no deepspeed here")):
        assert ranks[other].take_turn(0, 1.0) is None
        failed = replace(worlds[rank], ending=Ending())
        with pytest.raises(type(error)), failures_reported(failed), failures_reported(failed):
            raise error
    verdict = ranks[other].take_turn(1, 1.0)
    assert verdict and verdict.reason.startswith(f"lost rank {rank} (")
    assert verdict.reason.endswith("), which failed: no deepspeed here")
    monkeypatch.setattr(lost_ranks, "RankRecords", Mock(side_effect=RuntimeError("the store has ended")))
    with pytest.raises(LostRankError, match="no deepspeed here"), failures_reported(worlds[other]):
        raise RuntimeError("connection closed by peer")


def test_a_world_of_one_sends_none() -> None:
    with heartbeat.heartbeat(World(0, 1, 0, torch.device("cpu")), timeout_s=0.0):
        pass
