"""``launch/ladder.py`` starts the runs that are missing, and only those."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from launch import ladder
from launch.cli import run_command
from pipeline.checkpoint.layout import checkpoint_folder

Started = list[tuple[list[str], list[str]]]


def run_ladder(out: Path, monkeypatch: pytest.MonkeyPatch, *more: str, fails: bool = False) -> Started:
    """Run the command with a training that only creates its last checkpoint. Returns the started trainings."""
    started: Started = []

    def train(arguments: object, overrides: list[str], start: list[str] | tuple[()] = ()) -> None:
        started.append((overrides, list(start)))
        values = dict(override.split("=", 1) for override in overrides)
        checkpoint_folder(Path(values["run.out_dir"]), int(values["schedule.max_steps"])).mkdir(parents=True)

    monkeypatch.setattr(ladder, "train", train)
    monkeypatch.setattr(ladder, "start_logging", lambda: None)
    options = ["--config", "ddp", "quickstart", "--out", str(out), "--milestones", "40", "60", *more]
    monkeypatch.setattr(sys, "argv", ["ladder.py", *options])
    with pytest.raises(SystemExit) as ended:
        run_command(ladder.main)
    assert ended.value.code == (2 if fails else 0)
    return started


def test_one_stable_run_and_a_branch_per_milestone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stable, first, second = run_ladder(tmp_path, monkeypatch)
    assert {"schedule.name=constant", "schedule.max_steps=60", "checkpoint.keep_every_steps=20"} <= set(stable[0])
    assert not stable[1]
    assert {"schedule.name=wsd", "schedule.max_steps=50", "schedule.decay_steps=10"} <= set(first[0])
    assert first[1] == ["--init-from", str(tmp_path / "stable"), "--at-step", "40", "--branch"]
    assert f"run.out_dir={tmp_path / 'decay-from-60'}" in second[0] and "schedule.max_steps=75" in second[0]


def test_finished_runs_are_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_ladder(tmp_path, monkeypatch, "--decay-steps", "4")
    assert run_ladder(tmp_path, monkeypatch, "--decay-steps", "4") == []
    stable, branch = run_ladder(tmp_path, monkeypatch, "--decay-steps", "4", "--milestones", "80")
    assert "schedule.max_steps=80" in stable[0] and "schedule.max_steps=84" in branch[0]


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (["--set", "schedule.warmup_steps=50"], "--milestones 40: the warm-up takes schedule.warmup_steps 50 steps"),
        (["--set", "evaluation.tasks=[]"], "evaluation.tasks: a ladder compares validation losses; add validation"),
    ],
)
def test_a_mistake_is_one_line(
    more: list[str], expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_ladder(tmp_path, monkeypatch, *more, fails=True) == []
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {expected}")
