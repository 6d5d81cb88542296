"""A rank that fails or is stuck is named with the reason, although the other ranks wait in a collective."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from pipeline.errors import LostRankError
from tests.support.runs import REPOSITORY, Sections, merged, train_run

STUCK_TRAIN = REPOSITORY / "tests" / "support" / "stuck_train.py"


@pytest.fixture
def sabotage(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Break rank 1 after six steps. Destroying the process group would never end, either."""
    for name, value in {"STUCK_RANK": "1", "STUCK_STEP": "6", "STUCK_HOW": request.param}.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize("sabotage", ["raises"], indirect=True)
@pytest.mark.usefixtures("sabotage")
def test_the_exception_of_one_rank_is_printed_and_passed_on(sections: Sections, tmp_path: Path) -> None:
    result = train_run("ddp", tmp_path / "run", sections, processes=2, script=STUCK_TRAIN)
    assert result.returncode in (1, LostRankError.exit_status)
    assert "[rank 1 on " in result.stderr
    assert "OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB" in result.stderr
    assert re.search(
        r"^error: lost rank 1 \(.*\), which failed: OutOfMemoryError: CUDA out of memory", result.stderr, re.MULTILINE
    )


@pytest.mark.parametrize(
    ("config", "sabotage", "phase"),
    [
        ("ddp", "forward", "micro-batch 1 of "),
        ("fsdp", "data", "waiting for data "),
        ("zero1", "data", "waiting for data "),
        ("zero3", "forward", "micro-batch 1 of "),
    ],
    indirect=["sabotage"],
)
@pytest.mark.usefixtures("sabotage")
def test_a_rank_whose_main_thread_is_stuck_is_named(
    config: str, phase: str, sections: Sections, tmp_path: Path
) -> None:
    hurried = merged(sections, {"run": {"rank_timeout_s": 5}})
    result = train_run(config, tmp_path / "run", hurried, processes=2, script=STUCK_TRAIN)
    assert result.returncode == LostRankError.exit_status
    assert re.search(
        rf"^error: .*rank 1 \([^)]*\): not moved for \d+ s, in step 7, {phase}", result.stderr, re.MULTILINE
    )
    assert re.search(r"in sleep_for_ever\); .*run the same command again to continue", result.stderr)
    assert "the main thread is stuck here" in result.stderr
