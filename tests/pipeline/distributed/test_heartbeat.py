"""A rank whose heartbeats stop ends all ranks of the run, with one line per rank."""

from __future__ import annotations

import errno
import io
import sys
import threading

import pytest
import torch

from pipeline.distributed import heartbeat
from pipeline.distributed.heartbeat import Heartbeat
from pipeline.distributed.world import World
from pipeline.errors import LostRankError


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


def test_a_world_of_one_sends_none() -> None:
    with heartbeat.heartbeat(World(0, 1, 0, torch.device("cpu")), timeout_s=0.0):
        pass
