"""Files and ``--set`` become one config: which value wins, and which files and overrides are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipeline.config.keys import valid_keys
from pipeline.config.loading import config_from_json, dump_config, load_config
from pipeline.config.schema import Config
from pipeline.errors import ConfigError
from tests.pipeline.config.conftest import mistake
from tests.support.runs import CONFIGS

SHIPPED = sorted(CONFIGS.glob("*.json"))


class TestMerging:
    def test_no_file_gives_the_defaults(self) -> None:
        assert load_config([]) == Config()

    def test_a_later_file_wins_key_by_key(self, write: Any) -> None:
        first = write("a.json", {"schedule": {"max_steps": 100, "warmup_steps": 7}, "run": {"seed": 1}})
        second = write("b.json", {"schedule": {"max_steps": 200}})
        config = load_config([first, second])
        assert (config.schedule.max_steps, config.schedule.warmup_steps, config.run.seed) == (200, 7, 1)
        assert load_config([second, first]).schedule.max_steps == 100

    def test_set_wins_over_files_and_the_last_set_wins(self, write: Any) -> None:
        file = write("a.json", {"schedule": {"max_steps": 5000}})
        config = load_config([file], ["schedule.max_steps=900", "schedule.max_steps=800", "run.out_dir=runs/a b"])
        assert config.schedule.max_steps == 800
        assert config.run.out_dir == "runs/a b"

    def test_one_file_and_one_override_need_no_list(self) -> None:
        assert load_config("quickstart", "run.seed=3") == load_config(["quickstart"], ["run.seed=3"])
        assert load_config(CONFIGS / "quickstart.json") == load_config(["quickstart"])

    def test_set_takes_json_or_else_text(self) -> None:
        overrides = ["optimizer.betas=[0.8, 0.9]", "run.compile=true", "run.name=gpt=2", "evaluation.max_batches=null"]
        config = load_config([], [*overrides, "optimizer.learning_rate=3e-4"])
        assert config.optimizer.betas == (0.8, 0.9)
        assert config.run.compile is True
        assert config.run.name == "gpt=2"
        assert config.evaluation.max_batches is None
        assert config.optimizer.learning_rate == 3e-4

    def test_a_path_from_the_home_folder(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HOME", "/home/user")
        config = load_config([], ["run.out_dir=~/runs/a", "data.path=~/data"])
        assert (config.run.out_dir, config.data.path) == ("/home/user/runs/a", "/home/user/data")

    def test_native_deepspeed_json_merges_in_depth(self) -> None:
        config = load_config([CONFIGS / "zero2.json"], ["backend.deepspeed.zero_optimization.overlap_comm=false"])
        zero = config.backend.deepspeed["zero_optimization"]
        assert (zero["stage"], zero["overlap_comm"]) == (2, False)

    def test_an_empty_object_empties_a_key_but_no_section(self, write: Any) -> None:
        file = write("a.json", {"backend": {}, "schedule": {}})
        config = load_config([CONFIGS / "zero2.json", file], ["schedule.max_steps=5000", "schedule={}"])
        assert config.backend.zero["stage"] == 2 and config.schedule.max_steps == 5000
        assert load_config([CONFIGS / "zero2.json"], ["backend.name=ddp", "backend.deepspeed={}"]).backend.name == "ddp"

    def test_loading_does_not_affect_the_next_loading(self, write: Any) -> None:
        file = write("a.json", {"backend": {"name": "deepspeed", "deepspeed": {"zero_optimization": {"stage": 1}}}})
        load_config([file], ["backend.deepspeed.zero_optimization.stage=2"])
        assert load_config([file]).backend.deepspeed["zero_optimization"]["stage"] == 1


class TestResolvedConfig:
    @pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
    def test_it_loads_as_the_same_config(self, path: Path, write: Any) -> None:
        config = load_config([path], ["model.n_layer=3", "optimizer.betas=[0.85,0.9]"])
        resolved = dump_config(config)
        assert load_config([write("config.json", resolved)]) == config
        assert config_from_json(resolved, "state.json") == config

    def test_it_states_every_number(self) -> None:
        resolved = dump_config(load_config([]))
        for key in (key for key in valid_keys() if "*" not in key):
            section: Any = resolved
            for part in key.split("."):
                section = section[part]

    def test_an_invalid_stored_config_names_its_file(self) -> None:
        with pytest.raises(ConfigError, match=r"run\.sed: no such key \(set in old/state\.json\)"):
            config_from_json({"run": {"sed": 1}}, "old/state.json")


class TestShippedConfigs:
    def test_they_are_all_here(self) -> None:
        names = {path.stem for path in SHIPPED}
        assert {"ddp", "fsdp", "zero0", "zero1", "zero2", "zero3", "zero2_offload", "zero3_offload"} <= names

    @pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
    def test_each_is_a_whole_run_and_combines_with_the_quickstart(self, path: Path) -> None:
        alone = load_config([path])
        assert alone.run.name == path.stem
        assert alone.run.out_dir == f"runs/{path.stem}"
        small = load_config([path, CONFIGS / "quickstart.json"])
        assert small.model.preset == "gpt2-tiny"
        assert small.backend == alone.backend

    @pytest.mark.parametrize(
        ("name", "stage", "optimizer_on", "weights_on"),
        [
            ("zero0", 0, None, None),
            ("zero1", 1, None, None),
            ("zero2", 2, None, None),
            ("zero3", 3, None, None),
            ("zero2_offload", 2, "cpu", None),
            ("zero3_offload", 3, "cpu", "cpu"),
        ],
    )
    def test_a_zero_config_is_the_stage_of_its_name(
        self, name: str, stage: int, optimizer_on: str | None, weights_on: str | None
    ) -> None:
        zero = load_config([CONFIGS / f"{name}.json"]).backend.deepspeed["zero_optimization"]
        assert zero["stage"] == stage
        assert zero.get("offload_optimizer", {}).get("device") == optimizer_on
        assert zero.get("offload_param", {}).get("device") == weights_on


class TestUnreadableFilesAndOverrides:
    def test_all_unreadable_files_and_overrides_are_listed(self, tmp_path: Path) -> None:
        line = mistake([tmp_path / "none.json"], "no_value", ".=3")
        assert line.startswith("3 mistakes: ")
        assert "none.json: no such config file" in line and "--set no_value" in line and "--set .=3" in line

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ('{"run": \n {,}}', "a.json:2:3: not valid JSON: "),
            ("", "a.json: is empty (0 bytes); copy or download it again"),
            ("[1]", "a.json: expected a JSON object of sections, found [1]"),
            ('{"run": {}, "run": {}}', "a.json: the key 'run' is given twice"),
            (
                '{"run": {"seed": ' + "9" * 5000 + "}}",
                "a.json: the JSON is nested too deep or holds a number that is too long",
            ),
            ('{"run": {"seed": NaN}}', "run.seed: "),
        ],
    )
    def test_a_file_that_is_not_a_config(self, write: Any, text: str, message: str) -> None:
        assert message in mistake([write("a.json", text)])

    def test_a_missing_file_names_a_near_one_or_all(self, write: Any, tmp_path: Path) -> None:
        write("zero1.json", {})
        assert f"did you mean {tmp_path / 'zero1.json'}?" in mistake([tmp_path / "zero11.json"])
        assert f"there are: {tmp_path / 'zero1.json'}" in mistake([tmp_path / "other.json"])
        assert "no such config file" in mistake([tmp_path / "nowhere" / "a.json"])
        assert "did you mean ddp?" in mistake(["dpp"])
        assert "there are: ddp, fsdp" in mistake(["xyz"])

    @pytest.mark.parametrize("override", ["schedule.max_steps", "=3", "run..seed=3", ".seed=3", ""])
    def test_an_override_without_key_or_value(self, override: str) -> None:
        assert mistake([], override).startswith(f"--set {override}: expected section.key=value")
