"""``launch/train.py``: the options that say where a run starts."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

import launch.train
from data_tools.errors import UserError
from pipeline.config.schema import CheckpointConfig, Config
from pipeline.training import run
from tests.support.runs import CONFIGS


@pytest.fixture
def stable(tmp_path: Path) -> Path:
    """Return a run folder with the names of two checkpoints."""
    for step in (100, 200):
        (tmp_path / "stable" / "checkpoints" / f"step_{step:08d}").mkdir(parents=True)
    return tmp_path / "stable"


def start_of(monkeypatch: pytest.MonkeyPatch, *options: str) -> CheckpointConfig:
    """Return the section ``checkpoint`` of the config that the command trains with."""
    configs: list[Config] = []
    monkeypatch.setattr(run, "train", lambda config, hash_file: configs.append(config))
    monkeypatch.setattr(sys, "argv", ["train.py", "--config", str(CONFIGS / "ddp.json"), *options])
    launch.train.main()
    return configs[0].checkpoint


def test_a_branch_resumes_from_a_milestone_of_another_run(monkeypatch: pytest.MonkeyPatch, stable: Path) -> None:
    checkpoint = start_of(monkeypatch, "--init-from", str(stable), "--at-step", "100", "--branch")
    assert checkpoint.resume == str(stable / "checkpoints" / "step_00000100")
    assert checkpoint.init_from is None


def test_without_a_step_a_branch_begins_at_the_newest_checkpoint(monkeypatch: pytest.MonkeyPatch, stable: Path) -> None:
    assert start_of(monkeypatch, "--init-from", str(stable), "--branch").resume == str(stable)


def test_a_branch_does_not_take_over_the_url_of_its_run(monkeypatch: pytest.MonkeyPatch) -> None:
    options = ["--init-from", "s3://b/stable/", "--at-step", "60", "--branch", "--set", "run.out_dir=b"]
    with pytest.raises(UserError, match="--branch: s3://b/stable/ belongs to checkpoint.remote of this command, too"):
        start_of(monkeypatch, *options, "checkpoint.remote=s3://b/stable")
    checkpoint = start_of(monkeypatch, *options, "checkpoint.remote=s3://b/branch")
    assert checkpoint.resume == "s3://b/stable/checkpoints/step_00000060"


def test_the_weights_of_a_step(monkeypatch: pytest.MonkeyPatch, stable: Path) -> None:
    checkpoint = start_of(monkeypatch, "--init-from", str(stable), "--at-step", "200", "--resume", "none")
    assert checkpoint.init_from == str(stable / "checkpoints" / "step_00000200")
    assert checkpoint.resume == "none"


def test_the_state_of_a_step(monkeypatch: pytest.MonkeyPatch, stable: Path) -> None:
    checkpoint = start_of(monkeypatch, "--resume", str(stable), "--at-step", "200")
    assert checkpoint.resume == str(stable / "checkpoints" / "step_00000200")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--branch"], "--branch: name the run"),
        (["--branch", "--resume", "RUN"], "--branch: name the run"),
        (["--at-step", "100"], "--at-step: name the run"),
        (["--at-step", "100", "--resume", "auto"], "--at-step: name the run"),
        (["--init-from", "RUN", "--at-step", "150"], "no checkpoint of step 150; it has steps 100, 200"),
        (
            ["--init-from", "RUN/no", "--at-step", "9", "--branch"],
            "/no: no checkpoint here; .* path does not exist",
        ),
        (["--init-from", "RUN", "--branch", "--set", "run.out_dir=RUN"], "name a new folder for the branch"),
    ],
)
def test_options_that_do_not_fit_are_refused(
    monkeypatch: pytest.MonkeyPatch, stable: Path, options: list[str], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        start_of(monkeypatch, *(option.replace("RUN", str(stable)) for option in options))
