"""Three ranks in one process, which share a store and send heartbeats."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest
import torch
from torch._C._distributed_c10d import HashStore

from pipeline.distributed import heartbeat, lost_ranks
from pipeline.distributed.heartbeat import Heartbeat
from pipeline.distributed.world import World


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


def use_cpu(seconds: float) -> None:
    """Compute in this thread until it has used this much CPU time."""
    until = time.thread_time() + seconds
    while time.thread_time() < until:
        pass
