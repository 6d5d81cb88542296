"""Ranks with another program, config or run folder, or with other data, are refused at the start, with their host."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipeline.distributed.world import World
from pipeline.training.rank_agreement import RankFacts, describe_rank, find_difference
from tests.pipeline.conftest import tiny_config
from tests.support.runs import TINY_BYTE_RUN, curve_of, merged, run_ranks, train_arguments

MAIN = RankFacts(
    0, "node0", "/shared/run", "a" * 64, {"batch": {"tokens_per_step": 8}}, {"torch": "2.13.0", "source code": "0f"}
)


def test_paths_may_differ_between_hosts(world: World) -> None:
    starts = [
        describe_rank(tiny_config(data={"path": path}, run={"out_dir": path}), "a" * 64, world) for path in ("a", "b")
    ]
    assert starts[0].config and find_difference(*starts) is None


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"data_sha256": "b" * 64}, "data.path: rank 1 on node1 sees other data (manifest bbb"),
        (
            {"config": {"batch": {"tokens_per_step": 16}}},
            "rank 1 on node1 has another config than rank 0 on node0: batch.tokens_per_step 8 -> 16; start the same",
        ),
        (
            {"program": {"torch": "2.12.0"}},
            "rank 1 on node1 runs another program than rank 0 on node0: torch 2.13.0 ->",
        ),
        ({"program": {"source code": "1e"}}, "rank 1 on node1 runs another program than rank 0 on node0: source code"),
    ],
)
def test_a_difference_is_named_with_the_host(changed: dict[str, Any], message: str) -> None:
    problem = find_difference(MAIN, replace(MAIN, rank=1, host="node1", **changed))
    assert problem is not None and problem.startswith(message)


def test_ranks_with_different_working_folders_are_refused(byte_corpus: Path, tmp_path: Path) -> None:
    for rank in (0, 1):
        (tmp_path / f"node{rank}").mkdir()
    script = tmp_path / "train.py"
    script.write_text(
        "import os\n"
        "from launch.cli import run_command\n"
        "from launch.train import main\n"
        "from pipeline.training import rank_agreement\n"
        "rank_agreement._VISIBLE_WITHIN_S = 0.0\n"
        f"os.chdir(os.path.join({str(tmp_path)!r}, 'node' + os.environ['RANK']))\n"
        "run_command(main)\n"
    )
    sections = merged(TINY_BYTE_RUN, {"data": {"path": str(byte_corpus)}})
    result = run_ranks(2, script, train_arguments("ddp", Path("run"), sections))
    assert result.returncode == 2
    line = result.stderr.strip()
    assert line.startswith(f"error: run.out_dir: {tmp_path / 'node1' / 'run'} of rank 1 on ")
    assert f" and {tmp_path / 'node0' / 'run'} of rank 0 on " in line and "are different folders" in line
    assert not list(tmp_path.rglob(".shared-*"))


def test_the_file_of_a_killed_start_is_deleted(byte_corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".shared-0123").touch()
    step: dict[str, Any] = {"data": {"path": str(byte_corpus)}, "schedule": {"warmup_steps": 0, "max_steps": 1}}
    curve_of("ddp", tmp_path / "run", merged(TINY_BYTE_RUN, step), 2)
    assert not list((tmp_path / "run").glob(".shared-*"))
