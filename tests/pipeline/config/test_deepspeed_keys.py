"""DeepSpeed's JSON: which keys train with the same numbers, which need consent, and which files are DeepSpeed's own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.config.deepspeed_keys import OTHER_NUMBERS, SAME_NUMBERS, changes_of_numbers, keys_of_deepspeed
from pipeline.config.loading import dump_config, load_config
from pipeline.errors import ConfigError
from tests.pipeline.config.conftest import mistake
from tests.support.runs import CONFIGS

#: A value that changes something, for each key that changes the numbers.
CHANGED = {
    key: 0.5 if isinstance(neutral, float) else "bf16" if neutral is None else True
    for key, neutral in OTHER_NUMBERS.items()
}


def nest(key: str, value: Any) -> dict[str, Any]:
    for name in reversed(key.split(".")):
        value = {name: value}
    return value


def load(tmp_path: Path, native: dict[str, Any], *overrides: str) -> Any:
    (tmp_path / "ds.json").write_text(json.dumps(native))
    return load_config([], overrides, tmp_path / "ds.json")


class TestKeysThatChangeTheNumbers:
    @pytest.mark.parametrize("key", OTHER_NUMBERS)
    def test_are_refused_unless_allowed(self, key: str, tmp_path: Path) -> None:
        native = {"zero_optimization": {"stage": 3}, **nest(key, CHANGED[key])}
        native.get("zero_optimization", {})["stage"] = 3
        with pytest.raises(ConfigError, match=f"backend.deepspeed.{key}: changes the numbers"):
            load(tmp_path, native)
        config = load(tmp_path, native, "backend.allow_different_numbers=true")
        assert changes_of_numbers(config.backend) == [key]

    @pytest.mark.parametrize("key", OTHER_NUMBERS)
    def test_are_accepted_when_they_change_nothing(self, key: str, tmp_path: Path) -> None:
        if OTHER_NUMBERS[key] is not None:
            native = nest(key, OTHER_NUMBERS[key])
            native.setdefault("zero_optimization", {})["stage"] = 3
            assert not changes_of_numbers(load(tmp_path, native).backend)

    @pytest.mark.parametrize("key", ["zenflow", "compute_grad_norm", "some_later_key"])
    def test_cannot_come_with_a_key_that_was_not_examined(self, key: str, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match=f"zero_optimization.{key}: not among .*; remove it"):
            load(tmp_path, {"zero_optimization": {"stage": 2, key: {}}}, "backend.allow_different_numbers=true")

    def test_are_in_no_config_of_the_project(self) -> None:
        for path in CONFIGS.glob("*.json"):
            assert not changes_of_numbers(load_config([path]).backend)

    def test_cover_every_key_of_the_installed_deepspeed_that_is_accepted(self) -> None:
        zero_config = pytest.importorskip("deepspeed.runtime.zero.config").DeepSpeedZeroConfig
        known = {field.alias or name for name, field in zero_config.model_fields.items()}
        accepted = {key.split(".")[1] for key in OTHER_NUMBERS if key.startswith("zero_optimization.")}
        assert {*SAME_NUMBERS, *accepted} <= known


@pytest.mark.parametrize(
    ("native", "key"),
    [
        ({"optimizer": {"type": "Muon", "params": {"lr": 0.02}}}, "optimizer"),
        (nest("zero_optimization.save_muon_momentum_buffer_in_memory", True), "zero_optimization.save_muon_momentum"),
    ],
)
def test_the_muon_of_deepspeed_is_refused_with_the_key_to_use(native: dict[str, Any], key: str, tmp_path: Path) -> None:
    native = {**native, "zero_optimization": {"stage": 2, **native.get("zero_optimization", {})}}
    with pytest.raises(
        ConfigError, match=rf"backend.deepspeed.{key}\w*: .*set optimizer.name to muon and optimizer.muon"
    ):
        load(tmp_path, native)
    assert load_config([CONFIGS / "zero2.json"], ["optimizer.name=muon"]).optimizer.name == "muon"


class TestOwnFile:
    def test_is_merged_into_the_backend_section(self, tmp_path: Path) -> None:
        (tmp_path / "ds.json").write_text(json.dumps({"zero_optimization": {"stage": 2}, "steps_per_print": 5}))
        config = load_config([CONFIGS / "zero1.json"], ["run.seed=3"], tmp_path / "ds.json")
        assert config.backend.zero_stage == 2
        assert config.backend.zero["overlap_comm"] is True
        assert config.backend.deepspeed["steps_per_print"] == 5

    @pytest.mark.parametrize(
        ("content", "keys"),
        [
            ({"zero_optimization": {}, "bf16": {}}, ["zero_optimization", "bf16"]),
            ({"optimizer": {"type": "AdamW"}, "wandb": {}}, ["wandb"]),
            ({"optimizer": {"learning_rate": 1e-3}}, []),
            ({"run": {}, "fp16": {}}, []),
            ({}, []),
        ],
    )
    def test_is_recognized(self, content: dict[str, Any], keys: list[str]) -> None:
        assert keys_of_deepspeed(content) == keys

    def test_no_config_of_the_project_is_taken_for_one(self) -> None:
        for path in CONFIGS.glob("*.json"):
            assert not keys_of_deepspeed(json.loads(path.read_text()))
            assert not keys_of_deepspeed(dump_config(load_config([path])))


@pytest.mark.parametrize(
    ("native", "message"),
    [
        (
            {"train_batch_size": 8},
            "train_batch_size: the run config owns this; remove it and set batch.tokens",
        ),
        ({"bf16": {}}, "backend.deepspeed.bf16: the run config owns this; remove it and set run.precision"),
        ({"zero_optimisation": {}}, "did you mean zero_optimization?"),
        ({"zero_optimization": []}, "zero_optimization: must be an object, found []"),
        ({"zero_optimization": {"stage": 4}}, "zero_optimization.stage: must be 0, 1, 2 or 3, found 4"),
        ({"zero_optimization": {"stage": True}}, "zero_optimization.stage: must be 0, 1, 2 or 3, found true"),
        ({"zero_optimization": {"stage": "2"}}, 'zero_optimization.stage: must be 0, 1, 2 or 3, found "2"'),
        ({"zero_optimization": {"stage": 1, "offload_optimizer": None}}, "offload_optimizer: must be an object"),
        (
            {"zero_optimization": {"offload_optimizer": {}}},
            "offload_optimizer: needs zero_optimization.stage 1 or 2",
        ),
        ({"steps_per_print": 1.5}, "steps_per_print: must be a whole number, found 1.5"),
        ({"gradient_predivide_factor": float("inf")}, "every number must be finite"),
    ],
)
def test_native_deepspeed_json_that_cannot_work(write: Any, native: dict[str, Any], message: str) -> None:
    file = write("ds.json", {"backend": {"name": "deepspeed", "deepspeed": native}})
    line = mistake([file])
    assert message in line
    assert f"(set in {file})" in line


def test_native_deepspeed_json_under_another_backend() -> None:
    line = mistake([CONFIGS / "zero1.json"], "backend.name=fsdp")
    assert line.startswith("backend.deepspeed: set, but backend.name is fsdp; ")
    assert 'set backend.name to "deepspeed" or drop backend.deepspeed (--set backend.deepspeed={})' in line
