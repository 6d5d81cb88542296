"""Files and ``--set`` become one config: which value wins, and what a mistake says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.config import loading
from pipeline.config.loading import config_from_json, dump_config, load_config, valid_keys
from pipeline.config.schema import Config
from pipeline.errors import ConfigError
from tests.support.runs import CONFIGS

SHIPPED = sorted(CONFIGS.glob("*.json"))


@pytest.fixture
def write(tmp_path: Path) -> Any:
    """Return a function that writes a config file into the test's folder and returns its path."""

    def write_config(name: str, content: dict[str, Any] | str) -> Path:
        path = tmp_path / name
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return path

    return write_config


def mistake(files: list[Path], *overrides: str) -> str:
    """Return the one line of the error that loading these raises."""
    with pytest.raises(ConfigError) as caught:
        load_config(files, overrides)
    line = str(caught.value)
    assert len(line.splitlines()) == 1
    return line


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


class TestMistakes:
    @pytest.mark.parametrize(
        ("content", "path", "nearest"),
        [
            ({"schedule": {"max_step": 1}}, "schedule.max_step", "did you mean schedule.max_steps?"),
            ({"modle": {}}, "modle", "did you mean model?"),
            ({"RUN": {"seed": 1}}, "RUN", "did you mean run?"),
            ({"run": {"SEED": 1}}, "run.SEED", "did you mean run.seed?"),
            ({"LR": 1}, "LR", "did you mean optimizer.learning_rate?"),
            ({"run": {"warmup_steps": 1}}, "run.warmup_steps", "did you mean schedule.warmup_steps?"),
            ({"max_steps": 1}, "max_steps", "did you mean schedule.max_steps?"),
            (
                {"backend": {"ddp": {"bucket_mb": 1}}},
                "backend.ddp.bucket_mb",
                "did you mean backend.ddp.bucket_cap_mb?",
            ),
            ({"optimizer": {"fused": 1}}, "optimizer.fused", "valid keys here: name, learning_rate, betas, eps"),
            ({"optimizer": {"lr": 1}}, "optimizer.lr", "did you mean optimizer.learning_rate?"),
            ({"block_size": 1024}, "block_size", "did you mean model.context_length?"),
            (
                {"data": {"mixture": [{"path": "a", "weight": 1}, {"path": "b", "weight": 1, "wieght": 1}]}},
                "data.mixture.1.wieght",
                "did you mean data.mixture.1.weight?",
            ),
        ],
    )
    def test_an_unknown_key_names_its_file_and_the_nearest(
        self, write: Any, content: dict[str, Any], path: str, nearest: str
    ) -> None:
        line = mistake([CONFIGS / "ddp.json", write("mine.json", content)])
        assert line.startswith(f"{path}: no such key (set in ")
        assert "mine.json)" in line
        assert nearest in line

    def test_the_keys_for_names_of_other_programs_exist(self) -> None:
        assert set(loading._NAMES_ELSEWHERE) <= set(valid_keys())

    def test_the_file_named_is_the_one_that_set_it(self, write: Any) -> None:
        bad, good = write("bad.json", {"run": {"seed": "x"}}), write("good.json", {"run": {"name": "b"}})
        assert "(set in " + str(bad) in mistake([bad, good])
        assert "(set in --set)" in mistake([bad, good], "run.seed=y")
        load_config([bad, good], ["run.seed=2"])  # corrected by the override

    def test_an_unknown_key_is_reported_first(self, write: Any) -> None:
        line = mistake([write("a.json", {"run": {"seed": "x"}, "zzz": {}})])
        assert line.startswith("2 mistakes: (1) zzz: no such key")
        assert "; (2) run.seed: " in line

    def test_all_mistakes_are_listed(self, write: Any) -> None:
        content = {
            "run": {"seed": "x", "sead": 1},
            "model": {"n_head": 7, "n_layer": 2, "activation_checkpointing": 3, "n_heads": 7},
            "schedule": {"warmup_steps": 9, "max_steps": 4},
            "data": {"mixture": [{"path": "a", "weight": 0, "wieght": 1}]},
            "backend": {"name": "deepspeed", "deepspeed": {"wandb": {"enabled": True}, "optimizer": {}}},
        }
        line = mistake([write("a.json", content)], "batch.micro_batch_size=0")
        for key in (
            "run.sead: no such key",
            "model.n_heads: no such key",
            "data.mixture.0.wieght: no such key",
            "run.seed: ",
            "must be a multiple of n_head (7)",
            "activation_checkpointing (3) must not exceed n_layer (2)",
            "warmup_steps (9) must not exceed",
            "data.mixture.0.weight: ",
            "batch.micro_batch_size: ",
            "backend.deepspeed.wandb: ",
            "backend.deepspeed.optimizer: ",
        ):
            assert key in line
        assert line.startswith("10 mistakes: ") and "\n" not in line

    def test_many_mistakes_are_a_short_line(self, write: Any) -> None:
        """A hint is said once, and a file that is no run config does not fill the terminal."""
        line = mistake([write("a.json", {f"zz{number}": 1 for number in range(1000)})])
        assert line.startswith("1000 mistakes: (1) zz0: no such key") and line.count("valid keys here") == 1
        assert "(20) zz19: no such key" in line and "zz20:" not in line
        assert line.endswith("and 980 more, so this may not be a run config")

    def test_all_mistakes_across_sections_are_listed(self) -> None:
        line = mistake([], "data.seq_len=2000", "evaluation.sample=true", "model.vocab_size=300")
        assert "data.seq_len (2000) must not exceed" in line and "evaluation.sample needs" in line

    def test_all_unreadable_files_and_overrides_are_listed(self, tmp_path: Path) -> None:
        line = mistake([tmp_path / "none.json"], "no_value", ".=3")
        assert line.startswith("3 mistakes: ")
        assert "none.json: no such config file" in line and "--set no_value" in line and "--set .=3" in line

    def test_a_mixture_replaces_the_path_of_an_earlier_file_if_that_is_set_to_null(self, write: Any) -> None:
        earlier, later = write("a.json", {"data": {"path": "x"}}), write("b.json", {"data": {"path": None}})
        mixture = 'data.mixture=[{"path": "a", "weight": 1}]'
        assert mistake([earlier], mixture).startswith("data: path (x) and mixture are both given")
        assert [component.path for component in load_config([earlier, later], [mixture]).data.components] == ["a"]
        line = mistake([], 'data.mixture=[{"path": "a", "weight": 0}]')
        assert line == "data.mixture.0.weight: Input should be greater than 0, found 0 (set in --set)"

    def test_a_task_that_cannot_name_a_file(self, write: Any) -> None:
        line = mistake([write("a.json", {"evaluation": {"data": {"a/b": "x.jsonl"}}})])
        assert line.startswith("evaluation.data.a/b: String should match pattern")

    def test_a_long_value_is_cut(self) -> None:
        assert len(mistake([], f"run.seed={'x' * 10_000}")) < 200

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
    def test_native_deepspeed_json_that_cannot_work(self, write: Any, native: dict[str, Any], message: str) -> None:
        file = write("ds.json", {"backend": {"name": "deepspeed", "deepspeed": native}})
        line = mistake([file])
        assert message in line
        assert f"(set in {file})" in line

    def test_native_deepspeed_json_under_another_backend(self) -> None:
        line = mistake([CONFIGS / "zero1.json"], "backend.name=fsdp")
        assert line.startswith("backend.deepspeed: set, but backend.name is fsdp; ")
        assert 'set backend.name to "deepspeed" or drop backend.deepspeed (--set backend.deepspeed={})' in line
