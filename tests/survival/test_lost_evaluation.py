"""If a rank is killed, hangs or is stuck while it scores a checkpoint, the others end and name it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from pipeline.errors import LostRankError
from tests.support.live_run import LiveCommand
from tests.support.runs import REPOSITORY, Sections, curve_of, merged, ranks_command, run_ranks

STUCK_EVALUATE = REPOSITORY / "tests" / "support" / "stuck_evaluate.py"
TIMEOUT_S = 4


@pytest.fixture(scope="module")
def trained(sections: Sections, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained") / "run"
    curve_of("ddp", folder, merged(sections, {"schedule": {"max_steps": 2, "warmup_steps": 1}}))
    return folder


def arguments_of(trained: Path, out: Path) -> list[str]:
    return ["--checkpoint", str(trained), "--device", "cpu", "--out", str(out), "--rank-timeout", str(TIMEOUT_S)]


@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("how", ["is killed", "is suspended"])
def test_a_lost_rank_ends_the_others(how: str, victim: int, trained: Path, tmp_path: Path) -> None:
    command = ranks_command(2, STUCK_EVALUATE, arguments_of(trained, tmp_path / "results"))
    fault = {"STUCK_RANK": str(victim), "STUCK_HOW": how}
    with LiveCommand(command, STUCK_EVALUATE, tmp_path / "output", fault) as run:
        run.wait_until(lambda: len(run.ranks()) == 2)
        ranks = run.ranks()
        run.wait_until(lambda: "sends itself" in run.output)
        run.wait_until_gone({1 - victim: ranks[1 - victim]})
        reason = {"is killed": "", "is suspended": f", silent for {TIMEOUT_S} s"}[how]
        named = rf"^error: lost rank {victim} \(.*, pid {ranks[victim].pid}\){reason}"
        assert re.search(named, run.output, re.MULTILINE)
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize(("processes", "how"), [(1, "loops"), (1, "sleeps"), (2, "loops"), (2, "sleeps")])
def test_a_stuck_rank_is_named_with_its_task(
    processes: int, how: str, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STUCK_RANK", str(processes - 1))
    monkeypatch.setenv("STUCK_HOW", how)
    result = run_ranks(processes, STUCK_EVALUATE, arguments_of(trained, tmp_path / "results"))
    assert result.returncode == LostRankError.exit_status
    delay = {"loops": r"no progress in \d+ s of CPU time", "sleeps": r"not moved for \d+ s"}[how]
    assert re.search(
        rf"^error: (.*; )?rank {processes - 1} \([^)]*\): {delay}.*, in task validation ", result.stderr, re.MULTILINE
    )
    assert "the main thread is stuck here" in result.stderr
