"""The collectives of a rank are saved, and one line says in which one it waits."""

from __future__ import annotations

import pickle
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.distributed import heartbeat
from pipeline.distributed.flight_recorder import report_collectives, summarize
from pipeline.distributed.world import World

NOW_NS = 90_000_000_000


def entry(number: int, *, retired: bool, **changes: Any) -> dict[str, Any]:
    return {
        "profiling_name": "nccl:all_reduce",
        "collective_seq_id": number,
        "process_group": ("0", "default_pg"),
        "input_sizes": [[768, 3072], []],
        "time_created_ns": NOW_NS - 12_000_000_000,
        "retired": retired,
        **changes,
    }


@pytest.mark.parametrize(
    ("entries", "line"),
    [
        (
            [entry(1, retired=True), entry(2, retired=False)],
            "waits in nccl:all_reduce 2 of default_pg with 768x3072 scalar, 12 s ago",
        ),
        (
            [entry(1, retired=False, input_sizes=[[3]] * 4), entry(2, retired=False)],
            "waits in nccl:all_reduce 1 of default_pg with 3 3 and 2 more, 12 s ago, and 1 later",
        ),
        (
            [entry(1, retired=True)],
            "waits in no collective; the newest is nccl:all_reduce 1 of default_pg with 768x3072 scalar, 12 s ago",
        ),
        ([], "the flight recorder of torch has no collectives (TORCH_FR_BUFFER_SIZE=0 turns it off)"),
    ],
)
def test_the_first_unfinished_collective_is_named(entries: list[dict[str, Any]], line: str) -> None:
    assert summarize({"entries": entries}, NOW_NS) == line


def test_the_collectives_of_gloo_are_saved(world: World, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    torch.distributed.all_reduce(torch.ones(5, 7), group=world.group)
    saved = tmp_path / "flight_recorder" / "rank_0"
    deadline, line = time.monotonic() + 60, "waits in gloo"
    while "waits in gloo" in line and time.monotonic() < deadline:  # a thread records the end after the call returns
        report_collectives(saved.parent, rank=0)
        line = capfd.readouterr().err
    assert line.startswith("[rank 0] waits in no collective; the newest is gloo:all_reduce ")
    assert "with 5x7, " in line and line.endswith(f" ({saved})\n")
    assert pickle.loads(saved.read_bytes())["entries"][-1]["input_sizes"] == [[5, 7]]


def test_without_a_run_folder_nothing_is_saved(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    report_collectives(tmp_path / "no_run" / "flight_recorder", rank=0)
    report_collectives(None, rank=0)
    assert not list(tmp_path.iterdir()) and not capfd.readouterr().err


@pytest.mark.parametrize(
    ("error", "is_saved"),
    [
        (RuntimeError("Timed out waiting 1800000ms for recv operation to complete"), True),
        (torch.distributed.DistBackendError("Watchdog caught collective operation timeout: it timed out"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (TimeoutError("timed out"), False),
    ],
)
def test_a_collective_that_times_out_is_saved(error: Exception, is_saved: bool, tmp_path: Path) -> None:
    alone = World(0, 1, 0, torch.device("cpu"))
    with pytest.raises(type(error)), heartbeat.heartbeat(alone, 60.0, tmp_path / "flight_recorder"):
        raise error
    assert (tmp_path / "flight_recorder" / "rank_0").exists() == is_saved
