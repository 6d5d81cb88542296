"""The rank that the others wait for is named, with the times of all ranks."""

from __future__ import annotations

import json
import logging
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.distributed.links import Link
from pipeline.distributed.step_clock import StepTimes
from pipeline.distributed.world import World
from pipeline.run_folder.metrics import read_metrics
from pipeline.training.rank_comparison import RankComparison, find_slowest
from tests.support.runs import REPOSITORY, TINY_BYTE_RUN, merged, run_ranks, train_arguments

SLOW_TRAIN = REPOSITORY / "tests" / "support" / "slow_train.py"
SLOW_STEPS, SLEEP_S = 4, 0.3

Times = tuple[float, float, float]  # seconds: compute, data wait, collective wait
EQUAL: list[Times] = [(1.0, 0.0, 0.1)] * 3


class ThreeRanks(World):
    """The main rank of three. The times of the other ranks come from the test."""

    others: list[Times]

    def gather(self, item: Any) -> list[Any]:
        return ["node0", "node0", "node1"]

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        assert values.shape == (3, 3) and not values[1:].any(), "a rank fills its own row only"
        return values + torch.tensor([(0.0, 0.0, 0.0), *self.others])


@dataclass
class Clock:
    times: StepTimes | None = None
    is_active: bool = True

    def read(self) -> StepTimes | None:
        return self.times


def compare(comparison: RankComparison, times: list[Times]) -> dict[str, Any]:
    comparison._clock.times = StepTimes(*times[0])  # type: ignore[attr-defined]
    comparison._world.others = times[1:]  # type: ignore[attr-defined]
    comparison.start()
    return comparison.read()


@pytest.fixture
def comparison(caplog: pytest.LogCaptureFixture) -> RankComparison:
    caplog.set_level(logging.INFO)
    return RankComparison(Clock(), ThreeRanks(0, 3, 0, torch.device("cpu")), slow_ratio=1.5)  # type: ignore[arg-type]


def test_without_a_measurement_there_is_no_collective(comparison: RankComparison) -> None:
    comparison._clock.is_active = False
    comparison.start()  # the world has no times of the other ranks to sum
    assert comparison.read() == {}


def test_the_row_has_the_extremes_and_the_slowest_rank(comparison: RankComparison) -> None:
    row = compare(comparison, [(1.0, 0.25, 1.0), (2.0, 0.0, 0.25), (1.0, 1.5, 0.0)])
    assert {key: row[key] for key in row if key.startswith("compute")} == {
        "compute_ms_min": 1000.0,
        "compute_ms_mean": pytest.approx(4000 / 3),
        "compute_ms_max": 2000.0,
    }
    assert (row["data_wait_ms_min"], row["data_wait_ms_max"]) == (0.0, 1500.0)
    assert (row["collective_wait_ms_min"], row["collective_wait_ms_max"]) == (0.0, 1000.0)
    assert (row["slowest_rank"], row["slowest_host"]) == (2, "node1"), "the rank that waits least"
    assert row["slowest_ratio"] == pytest.approx(2.5 / 1.625)


def test_a_slow_rank_is_logged_once_until_it_recovers(
    comparison: RankComparison, caplog: pytest.LogCaptureFixture
) -> None:
    slow: list[Times] = [(1.0, 0.0, 1.0), (1.0, 0.0, 1.0), (1.6, 0.4, 0.0)]
    other: list[Times] = [(2.0, 0.0, 0.0), (1.0, 0.0, 1.0), (1.0, 0.0, 1.0)]
    for times, messages in ((slow, 1), (EQUAL, 1), (slow, 2), (other, 3)):
        for _ in range(4):
            compare(comparison, times)
        assert len(caplog.messages) == messages
    assert caplog.messages[0] == (
        "slow rank: rank 2 on node1 needs 2.00 times as long as the other ranks (1600 ms compute, 400 ms data wait "
        "per step)"
    )


def test_a_rank_that_is_slow_in_two_rows_is_not_logged(
    comparison: RankComparison, caplog: pytest.LogCaptureFixture
) -> None:
    slow: list[Times] = [(1.0, 0.0, 1.0), (2.0, 0.0, 0.0), (1.0, 0.0, 1.0)]
    other: list[Times] = [(2.0, 0.0, 0.0), (1.0, 0.0, 1.0), (1.0, 0.0, 1.0)]
    for times in (slow, slow, EQUAL, slow, slow, other, other):
        compare(comparison, times)
    assert not caplog.messages


def test_no_ratio_logs_nothing(caplog: pytest.LogCaptureFixture) -> None:
    world = ThreeRanks(0, 3, 0, torch.device("cpu"))
    comparison = RankComparison(Clock(), world, slow_ratio=None)  # type: ignore[arg-type]
    for _ in range(3):
        compare(comparison, [(1.0, 0.0, 1.0), (1.0, 0.0, 1.0), (9.0, 0.0, 0.0)])
    assert not caplog.messages


def test_a_slow_network_is_found_if_all_ranks_wait(comparison: RankComparison) -> None:
    one_waits_little: list[Times] = [(1.0, 0.0, 9.0), (9.0, 0.0, 1.0), (1.0, 0.0, 9.0)]
    all_wait: list[Times] = [(4.0, 0.0, 6.0), (3.0, 1.0, 6.0), (1.0, 0.0, 9.0)]
    assert not comparison.finds_slow_network(), "no step is measured"
    for times, expected in ((EQUAL, False), (one_waits_little, False), (all_wait, True)):
        compare(comparison, times)
        assert comparison.finds_slow_network() is expected, times
    comparison._hosts = ["node0"] * 3
    assert not comparison.finds_slow_network(), "there is no network"


def test_the_links_are_measured_again_only_if_the_ranks_wait_longer(
    comparison: RankComparison, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    links = [Link(1, 2, 2.4e6), Link(2, 0, 2.5e6)]
    monkeypatch.setattr("pipeline.training.rank_comparison.measure_links", lambda *_: links)
    for wait_s, expected in ((3.0, True), (3.0, False), (5.0, False), (7.0, True)):
        compare(comparison, [(1.0, 0.0, wait_s)] * 3)
        assert comparison.finds_slow_network() is expected, wait_s
        if expected:
            comparison.log_links()
    assert len(caplog.messages) == 2
    assert caplog.messages[0] == (
        "slow network: the links between the hosts transfer 2.4 to 2.5 MB/s; the slowest is from rank 1 on node0 to "
        "rank 2 on node1; all ranks wait at least 3000 ms per step for collectives"
    )


def test_a_rank_that_has_measured_nothing_gives_no_figures(comparison: RankComparison) -> None:
    assert compare(comparison, [(1.0, 0.0, 0.0), (1.0, 0.0, 0.0), (0.0, 0.0, 0.0)]) == {}


def test_the_slowest_of_two() -> None:
    assert find_slowest([3.0, 2.0]) == (0, 1.5)


@pytest.mark.parametrize("config", ["ddp", "fsdp", "zero3"])
def test_the_slowed_rank_is_named(config: str, byte_corpus: Path, tmp_path: Path) -> None:
    """First the loader of rank 1 is slow, then the forward pass of rank 0."""
    sections = merged(
        TINY_BYTE_RUN,
        {
            "data": {"path": str(byte_corpus)},
            "schedule": {"max_steps": 2 * SLOW_STEPS},
            "evaluation": {"tasks": []},
            "logging": {"every_steps": SLOW_STEPS, "sinks": ["jsonl", "tensorboard", "console"]},
        },
    )
    result = run_ranks(2, SLOW_TRAIN, train_arguments(config, tmp_path / "run", sections))
    assert result.returncode == 0, result.stderr
    slow_loader, slow_forward = (row for row in read_metrics(tmp_path / "run") if "slowest_rank" in row)
    assert slow_loader["slowest_rank"] == 1 and slow_forward["slowest_rank"] == 0, (slow_loader, slow_forward)
    assert slow_loader["data_wait_ms_max"] >= 1e3 * SLEEP_S
    assert slow_forward["compute_ms_max"] >= 1e3 * SLEEP_S and slow_forward["data_wait_ms_max"] < 1e3 * SLEEP_S
    for row in (slow_loader, slow_forward):
        assert row["collective_wait_ms_max"] > row["collective_wait_ms_min"] + 1e3 * SLEEP_S / 2, "the other rank waits"
        assert row["slowest_ratio"] > 1.2 and row["slowest_host"] == socket.gethostname()
    heartbeat = json.loads((tmp_path / "run" / "heartbeat.json").read_text())
    assert (heartbeat["state"], heartbeat["step"]) == ("finished", 2 * SLOW_STEPS)
