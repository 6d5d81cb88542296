"""Shipped configs are found by name; a file of that name wins."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.config.loading import load_config
from pipeline.config.shipped import find_config, shipped_configs
from pipeline.errors import ConfigError
from tests.support.runs import CONFIGS


def test_every_shipped_config_is_found_by_name() -> None:
    assert shipped_configs() == {path.stem: path for path in sorted(CONFIGS.glob("*.json"))}
    assert find_config("zero1") == CONFIGS / "zero1.json"


def test_a_file_of_that_name_wins_and_a_folder_does_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("zero1").mkdir()
    assert find_config("zero1") == CONFIGS / "zero1.json"
    Path("ddp").write_text('{"run": {"seed": 5}}')
    assert load_config(["ddp"]).run.seed == 5


def test_a_path_to_a_shipped_config_that_is_not_here_gets_its_name_as_advice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"ds_configs/zero1\.json: no such config file; .* give its name: zero1"):
        load_config(["ds_configs/zero1.json"])
    assert load_config(["zero1"]).backend.zero_stage == 1
