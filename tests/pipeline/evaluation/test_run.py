"""Tasks are run on a checkpoint, and their results go to files."""

from __future__ import annotations

import json
import logging
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from data_tools.errors import DataError
from data_tools.shards.manifest import load_manifest
from pipeline.backends.ddp import DdpBackend
from pipeline.checkpoint.loading import load_model
from pipeline.checkpoint.manifest import read_manifest
from pipeline.checkpoint.state import TrainingState
from pipeline.config.loading import dump_config
from pipeline.config.schema import Config
from pipeline.data.datasets import open_datasets
from pipeline.distributed.world import World
from pipeline.errors import CheckpointError, ConfigError
from pipeline.evaluation import output, scoring, validation_task
from pipeline.evaluation.examples import Settings
from pipeline.evaluation.protocols import PreparedTask
from pipeline.evaluation.results import find_results, format_table
from pipeline.evaluation.run import run_tasks
from pipeline.evaluation.validation import validate
from pipeline.hardware import matmul_ceiling
from pipeline.interop.hugging_face.exporting import export_checkpoint
from pipeline.report.runs import read_runs
from pipeline.report.tables import evaluation_table
from pipeline.run_folder.sinks.tensorboard import tensorboard_tag
from tests.pipeline.conftest import randomised_model, tiny_config, tiny_model_config, write_shards
from tests.pipeline.evaluation.conftest import ALONE, LAMBADA, PIQA, write_lines
from tests.support.checkpoints import save_checkpoint


@pytest.fixture
def run_folder(tmp_path: Path, data: Path, world: World) -> Path:
    """Return a run with one checkpoint."""
    config = tiny_config(tmp_path / "run", data={"path": str(data)})
    backend = DdpBackend(randomised_model(config.model), config, world)
    state = TrainingState(7, 28, 336, 7, 1.0, 0, config.run.seed)
    save_checkpoint(tmp_path / "run", state, dump_config(config), backend, world, 1)
    return tmp_path / "run"


class OtherRank(World):
    """A rank that is not the main rank."""

    is_main = property(lambda self: False)  # type: ignore[assignment]

    def call_on_main(self, function: Callable[[], Any]) -> Any:
        return function()


class TestOnACheckpoint:
    def test_results_are_written(self, run_folder: Path, results: dict[str, Any]) -> None:
        shown: list[Any] = []
        found, files = run_tasks(run_folder, ["validation"], Settings(), ALONE, show=shown.append)
        assert files == [run_folder / "evaluation" / "validation.json"]
        assert shown == [found]
        written = json.loads(files[0].read_text())
        assert written == found["validation"]
        assert written["loss"] == pytest.approx(results["loss"], rel=1e-6)
        assert written["step"] == 7
        assert Path(written["checkpoint"]) == run_folder / "checkpoints" / "step_00000007"

    @pytest.mark.parametrize("kind", ["shards", "mixture"])
    def test_only_results_of_the_same_weights_and_data_are_found(
        self, kind: str, data: Path, tmp_path: Path, world: World
    ) -> None:
        shards = shutil.copytree(data, tmp_path / "data")
        mixture = [{"path": str(path), "name": path.name, "weight": 1.0} for path in (shards, tmp_path / "other")]
        write_shards(tmp_path / "other", {"train": [np.arange(60)]})
        config = tiny_config(tmp_path / "run", data={"path": str(shards)} if kind == "shards" else {"mixture": mixture})
        backend = DdpBackend(randomised_model(config.model), config, world)

        def save(step: int) -> Path:
            state = TrainingState(step, 28, 336, 7, 1.0, 0, config.run.seed)
            return save_checkpoint(tmp_path / "run", state, dump_config(config), backend, world, 3)

        checkpoint = save(7)
        found, [file] = run_tasks(checkpoint, ["validation"], Settings(), ALONE)
        assert find_results(checkpoint, config) == found
        assert find_results(save(8), config) == found, "the weights are the same"
        backend.draw_weights(3)
        assert find_results(save(9), config) is None
        for damaged in ("", "[7]", json.dumps({**found["validation"], "weights_sha256": None})):
            file.write_text(damaged)
            assert find_results(checkpoint, config) is None
        file.write_text(json.dumps(found["validation"]))
        assert find_results(checkpoint, config) == found
        shutil.rmtree(shards)
        write_shards(shards, {"train": [np.arange(60)], "val": [np.arange(70)]})
        assert find_results(checkpoint, config) is None

    def test_results_of_another_precision_or_origin_are_not_those_of_the_run(
        self, tmp_path: Path, data: Path, world: World, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        model = {"vocab_size": 50257, "context_length": 60}
        config = tiny_config(tmp_path / "run", model=model, evaluation={"tasks": ["piqa"]})
        backend = DdpBackend(randomised_model(config.model), config, world)
        state = TrainingState(7, 28, 336, 7, 1.0, 0, 1337)
        checkpoint = save_checkpoint(tmp_path / "run", state, dump_config(config), backend, world, 1)

        def found_after(precision: str | None = None, **paths: str) -> bool:
            results, _ = run_tasks(checkpoint, ["piqa"], Settings(), ALONE, paths=paths, precision=precision)
            assert find_results(checkpoint, config) in (None, results)
            return find_results(checkpoint, config) is not None

        monkeypatch.setattr(datasets, "load_dataset", lambda *_, split: PIQA)
        assert found_after() and found_after("fp32")
        assert not found_after("bf16"), "run.precision is fp32"
        assert not found_after(piqa=str(write_lines(tmp_path / "piqa.jsonl", PIQA))), "the run reads the hub"

        config = tiny_config(tmp_path / "run", data={"path": str(data)})
        validated = {"task": "validation", "precision": "bf16"}
        sha256 = read_manifest(checkpoint).weights_sha256()
        validated |= {"weights_sha256": sha256, "data": str(data), "data_sha256": load_manifest(data).content_sha256()}
        file = tmp_path / "run" / "evaluation" / "validation.json"
        for precision in ("bf16", "fp32"):
            file.write_text(json.dumps({**validated, "precision": precision}))
            assert (find_results(checkpoint, config) is not None) == (precision == "fp32")

    def test_on_a_cpu_weights_are_packed_in_the_dtype_of_matrix_products(
        self, run_folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        packed = []
        monkeypatch.setattr(scoring, "pack_linear_layers", lambda model, dtype: packed.append(dtype))
        for precision in ("fp32", "amp_bf16", "bf16"):
            run_tasks(run_folder, ["validation"], Settings(), ALONE, precision=precision)
        assert packed == [torch.float32, torch.bfloat16, torch.bfloat16]

    def test_a_precision_of_the_run_that_is_slow_on_this_cpu_gives_a_warning(
        self, run_folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        """The run may have been trained on a GPU. Of several ranks, only the main rank measures the speed."""
        measured: list[torch.dtype] = []

        def speedup(dtype: torch.dtype) -> float:
            measured.append(dtype)
            return 30.0

        monkeypatch.setattr(matmul_ceiling, "_fp32_speedup", speedup)
        second = OtherRank.alone(ALONE.device)
        for precision, world in (("fp32", ALONE), ("amp_bf16", ALONE), ("amp_bf16", second)):
            run_tasks(run_folder, ["validation"], Settings(), world, precision=precision)
        (warning,) = caplog.messages
        assert warning.startswith("--precision amp_bf16 is slow on this CPU: ")
        assert warning.endswith("set --precision fp32")
        assert measured == [torch.bfloat16]

    @pytest.mark.parametrize("changed_until", [0, 6, 8])  # not at all, until an earlier start, after the checkpoint too
    def test_results_name_the_keys_that_changed_the_numbers(self, changed_until: int, run_folder: Path) -> None:
        keys = ["prescale_gradients"]
        rows = [{"step": step, **({"different_numbers": keys} if step <= changed_until else {})} for step in (6, 8)]
        write_lines(run_folder / "metrics.jsonl", rows)
        found, [file] = run_tasks(run_folder, ["validation"], Settings(), ALONE)
        assert json.loads(file.read_text()).get("different_numbers") == (keys if changed_until else None)
        label = ["different", "numbers", "prescale_gradients"]
        assert (label in [line.split() for line in format_table(found).splitlines()]) == bool(changed_until)
        table = evaluation_table(read_runs([run_folder])).rows
        assert table.get("validation different_numbers") == (keys if changed_until else None)

    def test_the_results_of_a_checkpoint_alone_name_the_keys_of_its_config(
        self, tmp_path: Path, data: Path, world: World
    ) -> None:
        changed = {"deepspeed": {"prescale_gradients": True}, "allow_different_numbers": True, "name": "deepspeed"}
        config = tiny_config(tmp_path / "run", data={"path": str(data)}, backend=changed)
        backend = DdpBackend(randomised_model(config.model), tiny_config(tmp_path / "run"), world)
        state = TrainingState(7, 28, 336, 7, 1.0, 0, config.run.seed)
        save_checkpoint(tmp_path / "run", state, dump_config(config), backend, world, 1)
        found, _ = run_tasks(tmp_path / "run", ["validation"], Settings(), ALONE)
        assert found["validation"]["different_numbers"] == ["prescale_gradients"]

    def test_results_are_written_to_another_folder(self, run_folder: Path, tmp_path: Path) -> None:
        found, files = run_tasks(run_folder, ["validation"], Settings(), ALONE, out=tmp_path / "new" / "results")
        assert files == [tmp_path / "new" / "results" / "validation.json"]
        assert json.loads(files[0].read_text()) == found["validation"]
        assert not (run_folder / "evaluation").exists() and not (run_folder / "tensorboard").exists()

    def test_the_results_of_a_run_that_cannot_be_written_are_only_shown(
        self, run_folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        monkeypatch.setattr(output, "is_writable", lambda path: False)
        shown: list[Any] = []
        with caplog.at_level(logging.WARNING):
            found, files = run_tasks(run_folder, ["validation"], Settings(), ALONE, show=shown.append)
        assert shown == [found] and files == []
        assert f"{run_folder} cannot be written: the results are only printed; --out DIR writes them" in caplog.text
        assert not (run_folder / "evaluation").exists()

    def test_a_folder_that_cannot_be_written_is_refused_first(
        self, run_folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(validation_task, "score_split", None)  # nothing is measured
        out = run_folder / "config.json" / "results"
        (run_folder / "config.json").touch()
        with pytest.raises(DataError, match=f"--out: cannot write {out}; name a place"):
            run_tasks(run_folder, ["validation"], Settings(), ALONE, out=out)

    def test_the_average_of_the_weights_can_be_scored(self, data: Path, tmp_path: Path, world: World) -> None:
        """Its results equal those of a run whose weights it is, and do not replace those of the trained weights."""
        config = tiny_config(tmp_path / "run", data={"path": str(data)}, averaging={"ema": 0.9})
        state = TrainingState(7, 28, 336, 7, 1.0, 0, config.run.seed)
        backend = DdpBackend(randomised_model(config.model), config, world)
        plain = DdpBackend(randomised_model(config.model, seed=2), tiny_config(data={"path": str(data)}), world)
        averages = {fragment.name: fragment.state["ema"] for fragment in backend.fragments()}
        for fragment in plain.fragments():
            averages[fragment.name].copy_(fragment.weight)
        for folder, of in ((tmp_path / "run", backend), (tmp_path / "plain", plain)):
            save_checkpoint(folder, state, dump_config(config), of, world, 1)
        own, _ = run_tasks(tmp_path / "run", ["validation"], Settings(), ALONE)
        found, files = run_tasks(tmp_path / "run", ["validation"], Settings(), ALONE, weights="ema")
        expected, _ = run_tasks(tmp_path / "plain", ["validation"], Settings(), ALONE)
        assert files == [tmp_path / "run" / "evaluation" / "validation_ema.json"]
        assert found["validation_ema"]["weights"] == "ema" and "weights" not in own["validation"]
        assert found["validation_ema"]["loss"] == expected["validation"]["loss"] != own["validation"]["loss"]
        assert find_results(tmp_path / "run" / "checkpoints" / "step_00000007", config) == own

        exported = export_checkpoint(tmp_path / "run", tmp_path / "out", "float32", "ema").path
        positions = load_file(exported / "model.safetensors")["transformer.wpe.weight"]
        assert torch.equal(positions.view(-1), averages["wpe.weight"])
        assert "moving average over the steps, decay 0.9" in (exported / "README.md").read_text()

    def test_results_are_written_to_tensorboard(self, run_folder: Path) -> None:
        found, _ = run_tasks(run_folder, ["validation"], Settings(), ALONE)
        events = EventAccumulator(str(run_folder / "tensorboard"))
        events.Reload()
        for key in ("loss", "perplexity", "bits_per_byte", "top1_accuracy", "top5_accuracy"):
            (scalar,) = events.Scalars(f"evaluation/validation_{key}")
            assert scalar.step == 7
            assert scalar.value == pytest.approx(found["validation"][key], rel=1e-5)

    def test_a_damaged_tensorboard_does_not_stop_an_evaluation(
        self, run_folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
        _, files = run_tasks(run_folder, ["validation"], Settings(), ALONE)
        assert files == [run_folder / "evaluation" / "validation.json"]
        (record,) = (record for record in caplog.records if "TensorBoard cannot be imported" in record.message)
        assert "\n" not in record.message

    def test_the_results_of_a_moved_checkpoint_are_written_into_it(self, run_folder: Path, tmp_path: Path) -> None:
        moved = (run_folder / "checkpoints" / "step_00000007").rename(tmp_path / "moved")
        _, files = run_tasks(moved, ["validation"], Settings(), ALONE, batch_size=3)
        assert files == [moved / "evaluation" / "validation.json"]
        assert load_model(moved, ALONE.device).step == 7, "its results do not damage it"

    def test_other_data_can_be_scored(self, run_folder: Path, tmp_path: Path) -> None:
        other = write_shards(tmp_path / "other", {"val": [np.arange(30)]})
        found, _ = run_tasks(run_folder, ["validation"], Settings(), ALONE, paths={"validation": str(other)})
        assert found["validation"]["target_tokens"] == 29
        assert found["validation"]["data"] == str(other)

    def test_each_component_of_a_mixture_is_scored(self, data: Path, tmp_path: Path, world: World) -> None:
        """The loss is the weighted mean; a component without a validation split is left out."""
        other = write_shards(tmp_path / "other", {"val": [np.arange(60)], "train": [np.arange(60)]})
        train_only = write_shards(tmp_path / "train_only", {"train": [np.arange(60)]})
        parts = [(data, "first", 3.0), (other, "second", 1.0), (train_only, "third", 5.0)]
        mixture = [{"path": str(path), "name": name, "weight": weight} for path, name, weight in parts]
        config = tiny_config(tmp_path / "run", data={"mixture": mixture})
        backend = DdpBackend(randomised_model(config.model), config, world)
        state = TrainingState(7, 28, 336, 7, 1.0, 0, config.run.seed)
        save_checkpoint(tmp_path / "run", state, dump_config(config), backend, world, 1)

        found, _ = run_tasks(tmp_path / "run", ["validation"], Settings(), ALONE)
        result = found["validation"]
        assert set(result["parts"]) == {"first", "second"}
        for name, path in (("first", data), ("second", other)):
            alone, _ = run_tasks(tmp_path / "run", ["validation"], Settings(), ALONE, paths={"validation": str(path)})
            assert result["parts"][name]["loss"] == alone["validation"]["loss"] == result[f"{name}_loss"]
        assert result["loss"] == pytest.approx(0.75 * result["first_loss"] + 0.25 * result["second_loss"])
        assert "first_loss" in format_table(found)

    def test_unusable_validation_data_is_an_error_before_a_task_is_scored(
        self, data: Path, tmp_path: Path, world: World, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A task that comes first can take hours."""
        monkeypatch.setattr(PreparedTask, "measure", lambda *_: pytest.fail("was scored"))
        config = tiny_config(tmp_path / "run", model={"vocab_size": 50257}, data={"path": str(data)})
        backend = DdpBackend(randomised_model(config.model), config, world)
        state = TrainingState(7, 28, 336, 7, 1.0, 0, 1337)
        save_checkpoint(tmp_path / "run", state, dump_config(config), backend, world, 1)
        own = str(write_lines(tmp_path / "own.jsonl", LAMBADA))
        unscored = {"val": [np.zeros(30, dtype=np.bool_)]}
        masked = write_shards(tmp_path / "masked", {"val": [np.arange(30)]}, masks=unscored)
        for path, expected in (
            (str(tmp_path), "has no manifest"),
            (str(masked), "'val' has no scored target"),
            (str(write_shards(tmp_path / "short", {"val": [np.arange(1)]})), "'val' has no scored target"),
        ):
            paths = {"own": own, "validation": path}
            with pytest.raises(DataError, match=expected):
                run_tasks(tmp_path / "run", ["own", "validation"], Settings(), ALONE, paths=paths)

    def test_a_component_without_scored_targets_is_left_out(self, data: Path, tmp_path: Path, world: World) -> None:
        """In both measurements, as a component without a validation split is."""
        tokens = np.arange(60)
        none = {"val": [np.zeros(60, dtype=np.bool_)], "train": [np.ones(60, dtype=np.bool_)]}
        masked = write_shards(tmp_path / "masked", {"val": [tokens], "train": [tokens]}, masks=none)
        mixture = [
            {"path": str(path), "name": name, "weight": 1.0} for path, name in ((data, "first"), (masked, "second"))
        ]
        config = tiny_config(tmp_path / "run", data={"mixture": mixture}, evaluation={"max_batches": None})
        backend = DdpBackend(randomised_model(config.model), config, world)
        save_checkpoint(
            tmp_path / "run", TrainingState(7, 28, 336, 7, 1.0, 0, 1337), dump_config(config), backend, world, 1
        )
        found, _ = run_tasks(tmp_path / "run", ["validation"], Settings(), ALONE)
        assert set(found["validation"]["parts"]) == {"first"}
        with backend.evaluation_mode():
            row = validate(backend, open_datasets(config), config, world)
        assert row["val_loss"] == row["val_loss_first"] == pytest.approx(found["validation"]["loss"], rel=1e-6)
        assert row["val_loss_second"] is None

    def test_the_scores_of_examples_are_written(self, tmp_path: Path, world: World) -> None:
        paths = {
            "piqa": str(write_lines(tmp_path / "piqa.jsonl", PIQA)),
            "own": str(write_lines(tmp_path / "own.jsonl", LAMBADA)),
        }
        evaluation = {"tasks": ["own"], "data": {"own": paths["own"]}}
        model = {"vocab_size": 50257, "context_length": 60}
        config = tiny_config(tmp_path / "run", model=model, evaluation=evaluation)
        backend = DdpBackend(randomised_model(config.model), config, world)
        checkpoint = save_checkpoint(
            tmp_path / "run", TrainingState(7, 28, 336, 7, 1.0, 0, 1337), dump_config(config), backend, world, 1
        )
        file, settings = tmp_path / "examples.jsonl", Settings(limits={"piqa": 2})
        found, _ = run_tasks(tmp_path / "run", ["piqa", "own"], settings, ALONE, paths=paths, examples_file=file)
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        assert [row["task"] for row in rows] == ["piqa_first2"] * 2 + ["own"] * len(LAMBADA)
        right = sum(row["choice"] == row["gold"] for row in rows if row["task"] == "piqa_first2")
        assert found["piqa_first2"]["acc"] == right / 2
        assert find_results(checkpoint, config) == {"own": found["own"]}
        write_lines(tmp_path / "own.jsonl", LAMBADA[:1])
        assert find_results(checkpoint, config) is None

    @pytest.mark.parametrize(
        ("tasks", "file", "expected"),
        [
            (["validation"], "examples.jsonl", "validation has no examples"),
            (["piqa"], "nowhere/examples.jsonl", "cannot be written; give a file in a folder that exists"),
            (["piqa"], ".", "cannot be written"),
        ],
    )
    def test_a_file_of_examples_that_cannot_be_written_is_refused_first(
        self, run_folder: Path, tmp_path: Path, tasks: list[str], file: str, expected: str
    ) -> None:
        with pytest.raises(ConfigError, match=f"--save-examples .*{expected}"):
            run_tasks(run_folder, tasks, Settings(), ALONE, examples_file=tmp_path / file)

    def test_the_loaded_model_is_the_saved_one(self, run_folder: Path) -> None:
        loaded = load_model(run_folder, ALONE.device)
        expected = randomised_model(tiny_model_config())
        assert all(torch.equal(loaded.model.get_parameter(name), p) for name, p in expected.named_parameters())
        assert not loaded.model.training
        loaded.model.assert_tied()

    def test_an_unknown_task_is_an_error_that_lists_the_tasks(self, run_folder: Path) -> None:
        with pytest.raises(ConfigError, match="--tasks squad: no such task; there are: validation"):
            run_tasks(run_folder, ["squad"], Settings(), ALONE)

    def test_no_checkpoint(self, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match="no checkpoint here"):
            run_tasks(tmp_path, ["validation"], Settings(), ALONE)

    @pytest.mark.parametrize("is_replaced", [True, False])
    def test_replaced_data_is_a_warning(
        self, is_replaced: bool, tmp_path: Path, data: Path, world: World, caplog: pytest.LogCaptureFixture
    ) -> None:
        config = tiny_config(tmp_path / "run", data={"path": str(data)})
        backend = DdpBackend(randomised_model(config.model), config, world)
        sha256 = load_manifest(data).content_sha256()
        state = TrainingState(7, 28, 336, 7, 1.0, 0, config.run.seed, data_sha256="0" * 64 if is_replaced else sha256)
        save_checkpoint(tmp_path / "run", state, dump_config(config), backend, world, 1)
        run_tasks(tmp_path / "run", ["validation"], Settings(), ALONE)
        assert (f"{data} now holds other data than the run was trained on" in caplog.text) == is_replaced
        caplog.clear()
        run_tasks(tmp_path / "run", ["validation"], Settings(), ALONE, paths={"validation": str(data)})
        assert not caplog.messages

    def test_data_of_another_tokenizer_is_an_error(self, tmp_path: Path, data: Path, world: World) -> None:
        config = tiny_config(tmp_path / "run", data={"path": str(data)})
        backend = DdpBackend(randomised_model(config.model), config, world)
        tokenizer = replace(load_manifest(data).tokenizer, vocabulary_sha256="f" * 64)
        state = TrainingState(7, 28, 336, 7, 1.0, 0, config.run.seed, tokenizer=tokenizer)
        save_checkpoint(tmp_path / "run", state, dump_config(config), backend, world, 1)
        with pytest.raises(ConfigError, match="was tokenized with .* trained on tokens of .*ffffffff"):
            run_tasks(tmp_path / "run", ["validation"], Settings(), ALONE)

    def test_data_without_a_validation_split(self, run_folder: Path, tmp_path: Path) -> None:
        only_train = write_shards(tmp_path / "other", {"train": [np.arange(30)]})
        with pytest.raises(DataError, match="no split 'val'; name a folder that has one with --data validation=DIR"):
            run_tasks(run_folder, ["validation"], Settings(), ALONE, paths={"validation": str(only_train)})


def test_figures_have_tensorboard_tags() -> None:
    assert tensorboard_tag("task_piqa_acc") == "tasks/piqa_acc"


def test_a_sample_needs_gpt2s_vocabulary() -> None:
    with pytest.raises(ValueError, match="evaluation.sample needs GPT-2's vocabulary: model.vocab_size is 89"):
        Config.model_validate({"model": {"vocab_size": 89}, "evaluation": {"sample": True}})


def test_a_task_of_any_name_needs_a_file() -> None:
    with pytest.raises(ValueError, match="no such task 'own'; there are validation, wikitext2"):
        Config.model_validate({"evaluation": {"tasks": ["own"]}})
    Config.model_validate({"evaluation": {"tasks": ["own"], "data": {"own": "own.txt"}}})
