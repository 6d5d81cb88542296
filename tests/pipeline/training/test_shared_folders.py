"""A run folder or data that the hosts do not share are refused at the start, with host and folder."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from pipeline.training.shared_folders import View, find_difference
from tests.support.runs import TINY_BYTE_RUN, merged, run_ranks, train_arguments

VIEW = View("node0", "/shared/run", has_token=True, data_sha256="a" * 64)


def test_ranks_that_see_the_same_are_accepted() -> None:
    assert find_difference([VIEW, replace(VIEW, host="node1")]) is None


def test_other_data_are_named_with_the_host() -> None:
    problem = find_difference([VIEW, replace(VIEW, host="node1", data_sha256="b" * 64)])
    assert problem is not None and problem.startswith("data.path: rank 1 on node1 sees other data (manifest bbb")


def test_ranks_with_different_working_folders_are_refused(byte_corpus: Path, tmp_path: Path) -> None:
    for rank in (0, 1):
        (tmp_path / f"node{rank}").mkdir()
    script = tmp_path / "train.py"
    script.write_text(
        "import os\n"
        "from launch.cli import run_command\n"
        "from launch.train import main\n"
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
