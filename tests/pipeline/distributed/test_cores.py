"""Ranks of a host compute side by side, unless somebody has said otherwise."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from pipeline.distributed import cores
from pipeline.distributed.cores import Placement, share_of, take_share_of_cores
from pipeline.distributed.environment import requested_threads
from pipeline.distributed.world import World


@pytest.fixture
def bound(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """Cores that the process is bound to, without being bound."""
    asked: list[list[int]] = []
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    monkeypatch.setattr(os, "sched_setaffinity", lambda pid, share: asked.append(list(share)), raising=False)
    return asked


class Hosts(World):
    """A rank among others, each with its local rank and the cores it may use."""

    def gather(self, item: Any) -> list[Any]:
        assert item == OFFERED[self.rank]
        return OFFERED


#: A host of 3 ranks on 8 shared cores, one of 2 ranks that a launcher has bound already, one of a single rank.
SHARED = [0, 1, 2, 3, 4, 5, 6, 7]
OFFERED = [(0, SHARED), (1, SHARED), (2, SHARED), (0, [0, 1]), (1, [2, 3]), (0, [0, 1, 2])]


@pytest.mark.parametrize(
    ("rank", "threads", "cores_of_rank"),
    [(0, 2, (0, 1)), (1, 3, (2, 3, 4)), (2, 3, (5, 6, 7)), (3, 2, None), (4, 2, None), (5, 3, None)],
)
def test_a_host_is_shared_by_its_own_ranks(
    monkeypatch: pytest.MonkeyPatch,
    bound: list[list[int]],
    rank: int,
    threads: int,
    cores_of_rank: tuple[int, ...] | None,
) -> None:
    local_rank, usable = OFFERED[rank]
    monkeypatch.setattr(cores, "_usable_cores", lambda: usable)
    world = Hosts(rank, len(OFFERED), local_rank, torch.device("cpu"))
    assert take_share_of_cores(world) == Placement(threads, cores_of_rank)
    assert bound == ([list(cores_of_rank)] if cores_of_rank else [])


def test_the_users_threads_stay(monkeypatch: pytest.MonkeyPatch, bound: list[list[int]]) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert take_share_of_cores(World(0, 1, 0, torch.device("cpu"))) == Placement(5, None)
    assert bound == []


@pytest.mark.parametrize(
    ("variables", "threads"),
    [
        ({}, None),
        ({"OMP_NUM_THREADS": "4"}, 4),
        ({"OMP_NUM_THREADS": "1"}, 1),
        ({"OMP_NUM_THREADS": "many"}, None),
        ({"OMP_NUM_THREADS": "1", "TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "2"}, None),
        ({"OMP_NUM_THREADS": "1", "TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "1"}, 1),
        ({"OMP_NUM_THREADS": "3", "TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "2"}, 3),
    ],
)
def test_what_torchrun_sets_is_nobodys_wish(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], threads: int | None
) -> None:
    for name in ("OMP_NUM_THREADS", "TORCHELASTIC_RUN_ID", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert requested_threads() == threads


@pytest.mark.parametrize(
    ("usable", "ranks", "shares"),
    [([4, 5, 6, 7], 2, [[4, 5], [6, 7]]), ([0, 1, 2], 2, [[0], [1, 2]]), ([0, 1], 3, [[0], [1], [0]])],
)
def test_shares(usable: Sequence[int], ranks: int, shares: list[list[int]]) -> None:
    assert [list(share_of(usable, rank, ranks)) for rank in range(ranks)] == shares
