"""An error of one rank is printed, told to the other ranks, and traced to a lost rank or to the network."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from torch.distributed import DistBackendError

from pipeline.distributed import failure, lost_ranks
from pipeline.distributed.failure import failures_reported, lost_rank_error, timeouts_recorded
from pipeline.distributed.heartbeat import Heartbeat
from pipeline.distributed.world import Ending, World
from pipeline.errors import CheckpointError, ConfigError, LostRankError, MainRankError, TrainingError


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


@pytest.mark.parametrize(
    ("error", "is_recorded"),
    [
        (DistBackendError("Watchdog caught collective operation timeout: it timed out"), True),
        (RuntimeError("Timed out waiting 1800000ms for recv operation to complete"), True),
        (RuntimeError("Connection closed by peer"), False),
        (CheckpointError("the server timed out"), False),
        (NotImplementedError("timed out"), False),
    ],
)
def test_only_a_collective_that_times_out_saves_the_flight_recorder(
    error: Exception, is_recorded: bool, worlds: list[World], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved: list[tuple[Path, int]] = []
    monkeypatch.setattr(failure, "report_collectives", lambda folder, rank: saved.append((folder, rank)))
    with pytest.raises(type(error)), timeouts_recorded(worlds[2], tmp_path):
        raise error
    assert saved == ([(tmp_path, 2)] if is_recorded else [])


def test_the_error_of_a_lost_rank_names_the_cure() -> None:
    world = World(0, 2, 0, torch.device("cpu"))
    world.ending.memory_kills = Mock(describe=lambda: None)
    cure = "run the same command again (training continues from the last checkpoint)"
    assert str(lost_rank_error("lost rank 1 (node1, pid 7)", world)) == f"lost rank 1 (node1, pid 7); {cure}"
