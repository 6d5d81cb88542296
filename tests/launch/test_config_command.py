"""``launch/config.py``: a first config that works, and where each key of a resolved config comes from."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

import launch.config
from data_tools.errors import UserError
from pipeline.config.loading import dump_config, load_config
from pipeline.config.schema import Config


def config(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["config.py", *arguments])
    launch.config.main()


def test_a_first_config_has_the_defaults(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "my.json"
    config(monkeypatch, "init", str(path))
    assert load_config([path]) == Config()
    content = json.loads(path.read_text())
    assert content["schedule"]["max_steps"] == Config().schedule.max_steps
    for name, backend in (("zero1", "deepspeed"), ("fsdp", "fsdp")):
        assert load_config([name, path]).backend.name == backend, "the README combines the file with a backend"
    with pytest.raises(UserError, match=r"my\.json: exists already"):
        config(monkeypatch, "init", str(path))
    with pytest.raises(UserError, match="cannot be written"):
        config(monkeypatch, "init", str(tmp_path / "nowhere" / "my.json"))


def test_a_full_disk_leaves_no_empty_config(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(UserError, match=r"my\.json: cannot be written \(No space left on device\)"):
        config(monkeypatch, "init", str(tmp_path / "my.json"))
    assert not list(tmp_path.iterdir())


def test_every_key_is_shown_with_its_origin(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    mine = tmp_path / "mine.json"
    mine.write_text('{"schedule": {"max_steps": 500, "warmup_steps": 3}}')
    config(monkeypatch, "show", "--config", "zero1", str(mine), "--set", "schedule.max_steps=700")
    lines = {line.split()[0]: line.split()[1:] for line in capsys.readouterr().out.splitlines()}
    assert lines["schedule.max_steps"] == ["700", "--set"]
    assert lines["schedule.warmup_steps"] == ["3", str(mine)]
    assert lines["schedule.min_lr_ratio"] == ["0.1"]
    stage, origin = lines["backend.deepspeed.zero_optimization.stage"]
    assert stage == "1" and origin.endswith("zero1.json")


def test_every_key_is_explained(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    config(monkeypatch, "keys")
    printed = capsys.readouterr().out
    assert all(f"{key} = " in printed for key in launch.config.FIRST_KEYS)
    assert max(map(len, printed.splitlines())) <= 150, "a default such as a long list is not wrapped"
    config(monkeypatch, "keys", "run.compile")
    first, *meaning = capsys.readouterr().out.splitlines()
    assert first == 'run.compile = "auto"' and meaning[0].startswith("    Compile the model and the loss")
    with pytest.raises(UserError, match="xyz: no such section or key; the sections are run, model, "):
        config(monkeypatch, "keys", "xyz")
    with pytest.raises(
        UserError, match=r"optimizer.lr: no such section or key; did you mean optimizer.learning_rate\?$"
    ):
        config(monkeypatch, "keys", "optimizer.lr")


def test_the_json_is_a_config(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    config(monkeypatch, "show", "--config", "zero1", "quickstart", "--json")
    shown = tmp_path / "shown.json"
    shown.write_text(capsys.readouterr().out)
    assert dump_config(load_config([shown])) == dump_config(load_config(["zero1", "quickstart"]))
