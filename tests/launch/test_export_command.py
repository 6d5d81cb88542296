"""``launch/export.py`` exports to a folder and imports it as a run that can be trained."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import launch.export
from data_tools.errors import PROJECT
from pipeline.checkpoint.layout import list_checkpoints
from pipeline.run_folder.metrics import read_metrics
from tests.pipeline.interop.hugging_face.conftest import random_text_model, save_in_pieces, text_config
from tests.support.commands import Done, command_runner
from tests.support.runs import TRAIN, overrides, run_ranks


@pytest.fixture
def run_export(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Done]:
    """Return a function that runs ``launch/export.py`` in this process, which saves the start of a new one."""
    return command_runner(launch.export, monkeypatch, capsys)


def test_exported_imported_and_trained_on(corpus: Path, tmp_path: Path, run_export: Callable[..., Done]) -> None:
    """The imported run starts with the loss of the exported model, and training continues from there."""
    run = save_in_pieces(random_text_model(text_config()), text_config(tmp_path / "run"), tmp_path / "run")

    def command(*arguments: object) -> str:
        status, output, errors = run_export(*arguments)
        assert status == 0, errors
        return output

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
        "logging": {"every_steps": 1, "sinks": ["jsonl", "console"]},
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


def test_a_mistake_is_one_line(tmp_path: Path, run_export: Callable[..., Done]) -> None:
    run, used, new = tmp_path / "run", tmp_path / "used", tmp_path / "new"
    save_in_pieces(random_text_model(text_config()), text_config(run), run)
    used.mkdir()
    (used / "precious").touch()
    (tmp_path / "file").touch()
    mistakes: list[tuple[tuple[object, ...], str]] = [
        (("--out", new), "--checkpoint --from-hf is required (see export.py --help)"),
        (("--checkpoint", run, "--from-hf", "x", "--out", new), "--from-hf: not allowed with argument --checkpoint"),
        (("--checkpoint", run), "required: --out"),
        (("--checkpoint", run, "--out", new, "--dtype", "int8"), "--dtype: invalid choice: 'int8' (choose from"),
        (("--from-hf", used, "--out", new, "--dtype", "bfloat16"), "--dtype: only for exporting"),
        (("--checkpoint", run, "--out", new, "--dtype", "float16"), "--dtype float16: only for --format gguf; use"),
        (("--from-hf", used, "--out", new, "--format", "gguf"), "--format: only for exporting"),
        (("--checkpoint", run, "--out", tmp_path / "x.gguf"), "x.gguf: the name of a GGUF file; add --format gguf, or"),
        (
            ("--from-hf", run, "--out", new),
            f"{run}: this is a run or a checkpoint of {PROJECT}, not a Hugging Face model",
        ),
        (("--checkpoint", run, "--out", used, "--format", "gguf"), f"{used} already exists; name a new file"),
        (("--checkpoint", run, "--out", used), f"{used} already exists and is not an empty folder"),
        (("--checkpoint", run, "--out", tmp_path / "file"), "file already exists and is not an empty folder"),
        (("--checkpoint", run, "--out", tmp_path / "file" / "out"), "cannot write"),
        (("--checkpoint", used, "--out", tmp_path / "file" / "out"), "cannot write"),  # before it reads the checkpoint
        (("--from-hf", used, "--out", tmp_path / "file" / "out"), "cannot write"),
        (("--checkpoint", used, "--out", new), f"{used}: no checkpoint here; expected a run folder"),
        (("--from-hf", used, "--out", new), "used/config.json: missing; expected a folder"),
        (("--from-hf", f"{tmp_path}/no", "--out", new), "no: no such folder; expected one with config.json, or a hub"),
        (("--from-hf", used, "--out", run), f"{run} already has checkpoints"),
    ]
    for arguments, expected in mistakes:
        status, _, errors = run_export(*arguments)
        assert status == 2, errors
        assert len(errors.splitlines()) == 1, errors
        assert errors.startswith("error: ") and expected in errors, errors
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "run", "used"]


def test_the_format_gguf_needs_its_package(
    tmp_path: Path, run_export: Callable[..., Done], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    monkeypatch.delitem(sys.modules, "pipeline.interop.gguf_file", raising=False)
    status, _, errors = run_export("--checkpoint", tmp_path, "--out", tmp_path / "m.gguf", "--format", "gguf")
    assert status == 2 and len(errors.splitlines()) == 1
    assert errors.startswith("error: --format gguf: the package gguf is missing") and "[gguf]" in errors
