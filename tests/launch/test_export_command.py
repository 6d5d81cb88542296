"""``launch/export.py``: out to a folder, back into a run, and on with training."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

import launch.export
from benchmarks.runs import TRAIN, overrides, run_ranks
from launch.cli import run_command
from pipeline.checkpoint import list_checkpoints
from pipeline.metrics import read_metrics
from tests.pipeline.hugging_face.conftest import restless, save_in_pieces, text_config


def test_exported_imported_and_trained_on(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The imported run's first loss is what the exported model has, and it goes on from there."""
    monkeypatch.setattr(launch.export, "start_logging", lambda: None)  # would outlive the call
    run = save_in_pieces(restless(text_config()), text_config(tmp_path / "run"), tmp_path / "run")

    def command(*arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", ["export.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            run_command(launch.export.main)
        shown = capsys.readouterr()
        assert ended.value.code == 0, shown.err
        return shown.out

    assert f"wrote {tmp_path / 'hf'}, weights " in command("--checkpoint", run, "--out", tmp_path / "hf")
    assert "step_00000000" in command("--from-hf", tmp_path / "hf", "--out", tmp_path / "imported")
    assert json.loads((tmp_path / "imported" / "config.json").read_text())["model"]["n_embd"] == 24

    settings = {
        "run": {"precision": "fp32", "device": "cpu"},
        "data": {"path": str(corpus), "seq_len": 32},
        "batch": {"tokens_per_step": 128, "micro_batch_size": 4},
        "optimizer": {"learning_rate": 1e-3},
        "schedule": {"max_steps": 3, "warmup_steps": 1},
        "evaluation": {"max_batches": 2},
        "logging": {"every_steps": 1, "tensorboard": False},
    }
    imported = tmp_path / "imported"
    arguments = ["--config", str(imported / "config.json"), "--resume", str(imported), "--set", *overrides(settings)]
    result = run_ranks(1, TRAIN, arguments)
    assert result.returncode == 0, result.stdout + result.stderr
    assert [folder.name for folder in list_checkpoints(imported)][-1] == "step_00000003"
    losses = [row["loss"] for row in read_metrics(imported) if "loss" in row]
    assert len(losses) == 3
    assert losses[0] > 11.3  # those of a new model begin at 10.83
    assert losses[2] < losses[0]
