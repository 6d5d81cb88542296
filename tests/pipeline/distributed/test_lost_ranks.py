"""A rank that sends no heartbeat is found and named, also if the rank that searches dies."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from torch._C._distributed_c10d import Store

from pipeline.distributed import lost_ranks
from pipeline.distributed.heartbeat import Heartbeat
from pipeline.distributed.lost_ranks import find_lost
from pipeline.distributed.world import World
from tests.pipeline.distributed.conftest import SharedStore, shorten_interval


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


def test_a_silent_rank_is_named(worlds: list[World], ranks: list[Heartbeat]) -> None:
    for rank in ranks[:2]:
        rank.start()
    lost = find_lost(worlds[0])
    assert lost is not None and lost.startswith("lost rank 2 (") and ", pid " in lost
    for rank in ranks[:2]:
        rank.stop()


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
