"""If a rank is killed, hangs or is stuck while it scores a checkpoint, the others end and name it."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from pipeline.errors import LostRankError
from tests.support.runs import REPOSITORY, Sections, curve_of, merged, run_ranks

STUCK_EVALUATE = REPOSITORY / "tests" / "support" / "stuck_evaluate.py"
TIMEOUT_S = 4


@pytest.fixture(scope="module")
def trained(sections: Sections, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained") / "run"
    curve_of("ddp", folder, merged(sections, {"schedule": {"max_steps": 2, "warmup_steps": 1}}))
    return folder


def evaluate(
    processes: int, victim: int, how: str, trained: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> subprocess.CompletedProcess[str]:
    monkeypatch.setenv("STUCK_RANK", str(victim))
    monkeypatch.setenv("STUCK_HOW", how)
    options = ["--checkpoint", str(trained), "--device", "cpu", "--out", str(out), "--rank-timeout", str(TIMEOUT_S)]
    result = run_ranks(processes, STUCK_EVALUATE, options)
    assert not out.exists()
    return result


@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("how", ["is killed", "is suspended"])
def test_a_lost_rank_ends_the_others(
    how: str, victim: int, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a launcher, rank 0 serves the store, so a rank that loses it does not know what has ended."""
    result = evaluate(2, victim, how, trained, tmp_path / "results", monkeypatch)
    found = re.search(r"pid (\d+) sends itself", result.stdout)
    assert found, result.stdout
    name = ["rank 0, or the launcher on its node", rf"rank 1 \(.*, pid {found[1]}\)"][victim]
    reason = {"is killed": "", "is suspended": f", silent for {TIMEOUT_S} s"}[how]
    assert re.search(rf"^error: lost {name}{reason}", result.stderr, re.MULTILINE)


@pytest.mark.parametrize(("processes", "how"), [(1, "loops"), (2, "sleeps")])
def test_a_stuck_rank_is_named_with_its_task(
    processes: int, how: str, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = evaluate(processes, processes - 1, how, trained, tmp_path / "results", monkeypatch)
    assert result.returncode == LostRankError.exit_status
    delay = {"loops": r"no progress in \d+ s of CPU time", "sleeps": r"not moved for \d+ s"}[how]
    assert re.search(
        rf"^error: (.*; )?rank {processes - 1} \([^)]*\): {delay}.*, in task validation ", result.stderr, re.MULTILINE
    )
    assert "the main thread is stuck here" in result.stderr


def test_data_that_only_another_rank_lacks_is_one_line(trained: Path, byte_corpus: Path, tmp_path: Path) -> None:
    """The ranks start in different folders, and the path of the data is relative."""
    for rank in (0, 1):
        (tmp_path / f"node{rank}").mkdir()
    (tmp_path / "node0" / "tokens").symlink_to(byte_corpus)
    script = tmp_path / "evaluate.py"
    script.write_text(
        "import os\n"
        "from launch.cli import run_command\n"
        "from launch.evaluate import main\n"
        f"os.chdir(os.path.join({str(tmp_path)!r}, 'node' + os.environ['RANK']))\n"
        "run_command(main)\n"
    )
    options = ["--checkpoint", str(trained), "--device", "cpu", "--tasks", "validation", "--data", "validation=tokens"]
    result = run_ranks(2, script, options)
    (line,) = [line for line in result.stderr.splitlines() if "error: " in line]
    assert line.startswith("error: rank 1 on ") and ": tokens: " in line and "lost" not in line
