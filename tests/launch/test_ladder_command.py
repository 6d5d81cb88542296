"""``launch/ladder.py`` starts the runs that are missing, and only those. It notices settings that have changed."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from launch.cli import run_command
from launch import ladder
from launch.train import build_parser
from pipeline.checkpoint.layout import STATE_FILE, checkpoint_folder
from pipeline.config.loading import dump_config, load_config


class Training(NamedTuple):
    values: list[str]  # of --set
    start: list[str]  # the options that say where the run starts
    processes: int


Started = list[Training]


def write_checkpoint(arguments: argparse.Namespace, step: int) -> None:
    config = load_config(arguments.config, arguments.set)
    folder = checkpoint_folder(Path(config.run.out_dir), step)
    folder.mkdir(parents=True, exist_ok=True)
    counts = dict.fromkeys(("samples", "tokens", "updates", "loss_scale_good_steps", "seed"), 0)
    state = {"step": step, **counts, "loss_scale": None, "world_size": 1, "versions": {}, "config": dump_config(config)}
    (folder / STATE_FILE).write_text(json.dumps(state))


def run_ladder(out: Path, monkeypatch: pytest.MonkeyPatch, *more: str, fails: bool = False) -> Started:
    """Run the command with a training that only writes the states of checkpoints. Returns the started trainings."""
    started: Started = []

    def train(options: list[str], *, processes: int) -> None:
        arguments = build_parser().parse_args(options)
        start = options[options.index("--init-from") :] if arguments.init_from else []
        started.append(Training(arguments.set, start, processes))
        values = dict(override.split("=", 1) for override in arguments.set)
        last, kept = int(values["schedule.max_steps"]), values["checkpoint.keep_every_steps"]
        for step in range(int(kept), last, int(kept)) if kept != "null" else ():
            write_checkpoint(arguments, step)
        write_checkpoint(arguments, last)

    monkeypatch.setattr(ladder, "train", train)
    monkeypatch.setattr(ladder, "start_logging", lambda: None)
    options = ["--config", "ddp", "quickstart", "--out", str(out), "--milestones", "40", "60", *more]
    monkeypatch.setattr(sys, "argv", ["ladder.py", *options])
    with pytest.raises(SystemExit) as ended:
        run_command(ladder.main)
    assert ended.value.code == (2 if fails else 0)
    return started


def folders(started: Started) -> list[str]:
    """Return the names of the run folders of the started trainings."""
    return [Path(text).name for run in started for text in run.values if text.startswith("run.out_dir=")]


def rows(out: Path) -> list[tuple[int, int, str]]:
    """Return the milestone, the last step and the run folder of each row of the table."""
    return [(rung["milestone"], rung["steps"], Path(rung["run"]).name) for rung in json.loads(out.read_text())]


def test_one_stable_run_and_a_branch_per_milestone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stable, first, second = run_ladder(tmp_path, monkeypatch, "--processes", "3")
    assert {"schedule.name=constant", "schedule.max_steps=60", "checkpoint.keep_every_steps=20"} <= set(stable.values)
    assert not stable.start
    assert {"schedule.name=wsd", "schedule.max_steps=50", "schedule.decay_steps=10"} <= set(first.values)
    assert first.start == ["--init-from", str(tmp_path / "stable"), "--at-step", "40", "--branch"]
    assert (
        f"run.out_dir={tmp_path / 'decay-from-60-to-75'}" in second.values and "schedule.max_steps=75" in second.values
    )
    assert {run.processes for run in (stable, first, second)} == {3}


def test_finished_runs_are_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_ladder(tmp_path, monkeypatch, "--decay-steps", "4")
    same = ["--decay-steps", "4", "--set", "batch.micro_batch_size=2", "checkpoint.every_steps=7", "run.name=again"]
    assert run_ladder(tmp_path, monkeypatch, *same) == [], "these settings do not change the numbers"
    stable, branch = run_ladder(tmp_path, monkeypatch, "--decay-steps", "4", "--milestones", "80")
    assert "schedule.max_steps=80" in stable.values and "schedule.max_steps=84" in branch.values


def test_another_decay_is_trained_in_folders_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The long run is used again, and each table has the branches of its own command."""
    run_ladder(tmp_path, monkeypatch)
    table = tmp_path / "ladder.json"
    before = rows(table)
    assert before == [(40, 50, "decay-from-40-to-50"), (60, 75, "decay-from-60-to-75")]
    shorter = run_ladder(tmp_path, monkeypatch, "--decay-steps", "4")
    assert folders(shorter) == ["decay-from-40-to-44", "decay-from-60-to-64"]
    assert rows(table) == [(40, 44, "decay-from-40-to-44"), (60, 64, "decay-from-60-to-64")]
    shape = ["--set", "schedule.decay_shape=1-sqrt"]
    assert folders(run_ladder(tmp_path, monkeypatch, *shape)) == ["decay-from-40-to-50-2", "decay-from-60-to-75-2"]
    assert run_ladder(tmp_path, monkeypatch, *shape) == []
    assert folders(run_ladder(tmp_path, monkeypatch, "--set", "schedule.min_lr_ratio=0.25")) == [
        "decay-from-40-to-50-3",
        "decay-from-60-to-75-3",
    ]
    assert run_ladder(tmp_path, monkeypatch) == []
    assert rows(table) == before


@pytest.mark.parametrize(
    ("before", "more", "expected"),
    [
        ([], ["--set", "schedule.warmup_steps=50"], "--milestones 40: the warm-up takes schedule.warmup_steps 50 step"),
        ([], ["--set", "evaluation.tasks=[]"], "evaluation.tasks: a ladder compares validation losses; add validation"),
        ([], ["--set", "schedule.stop_at_val_loss=4"], "schedule.stop_at_val_loss: every run of a ladder must reach"),
        ([], ["--set", "schedule.name=linear"], "--set schedule.name: this command sets the key for each run; leave"),
        ([], ["--set", 'schedule={"max_steps": 90}'], "--set schedule.max_steps: this command sets the key for each"),
        ([], ["--set", "schedule.decay_steps=9"], "--set schedule.decay_steps: this command sets the key for each r"),
        (
            ["--milestones", "80"],
            ["--set", "optimizer.weight_decay=0.2", "run.seed=7"],
            "OUT/stable: was trained with other settings (optimizer.weight_decay 0.1 -> 0.2, run.seed 1337 -> 7);",
        ),
        (
            ["--milestones", "80"],
            ["--milestones", "50"],
            "--milestones 50: OUT/stable has passed this step and has only kept the steps 20, 40, 60, 80; name some",
        ),
    ],
)
def test_a_mistake_is_one_line(
    before: list[str],
    more: list[str],
    expected: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if before:
        run_ladder(tmp_path, monkeypatch, *before)
    assert run_ladder(tmp_path, monkeypatch, *more, fails=True) == []
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {expected}".replace("OUT", str(tmp_path)))
