"""What stage 3 reports is what a plain loop over the split finds."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from data_tools.errors import DataError
from data_tools.shards import TokenStream, open_split
from pipeline.backends.ddp import DdpBackend
from pipeline.checkpoint import TrainingState, save_checkpoint
from pipeline.checkpoint.loading import load_model
from pipeline.config.loading import dump_config
from pipeline.distributed.world import World
from pipeline.errors import CheckpointError, ConfigError, TrainingError
from pipeline.evaluation import tasks
from pipeline.evaluation.results import find_results, format_table
from pipeline.evaluation.tasks import EvaluationOptions, run_tasks
from pipeline.evaluation.validation import evaluate_validation
from pipeline.model.gpt2 import GPT2
from tests.pipeline.conftest import (
    END_OF_TEXT,
    restless_model,
    tiny_config,
    tiny_model_config,
    write_shards,
)

T = 12
TOKENS = 131  # 10 windows, and one of 10 targets
UTF8_BYTES = 456
ALONE = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokens = np.random.default_rng(0).integers(0, END_OF_TEXT, TOKENS)
    tokens[[0, 40, 41, 90]] = END_OF_TEXT
    folder = tmp_path_factory.mktemp("evaluation") / "data"
    return write_shards(folder, {"train": [tokens], "val": [tokens[:50], tokens[50:]]}, UTF8_BYTES)


@pytest.fixture(scope="module")
def stream(data: Path) -> TokenStream:
    return open_split(data, "val")


@pytest.fixture(scope="module")
def model() -> GPT2:
    return restless_model(tiny_model_config()).eval()


@pytest.fixture(scope="module")
def direct(model: GPT2, stream: TokenStream) -> list[tuple[int, int, float, int]]:
    """(position, target, loss, rank of the target among the guesses) of each target, one by one."""
    text = stream.read(0, stream.tokens).astype(int).tolist()
    found = []
    for at in range(1, len(text)):
        begin = (at - 1) // T * T  # of the window that scores this target
        with torch.no_grad():
            logits = model.logits(torch.tensor([text[begin:at]]))[0, -1].double()
        loss = (logits.logsumexp(0) - logits[text[at]]).item()
        found.append((at - 1 - begin, text[at], loss, int((logits > logits[text[at]]).sum())))
    return found


@pytest.fixture(scope="module")
def results(model: GPT2, stream: TokenStream) -> dict[str, Any]:
    return evaluate_validation(model, stream, T, 4, "fp32", ALONE)


def mean(values: Any) -> float:
    return float(np.mean(list(values)))


class TestValidation:
    def test_loss_and_perplexity(self, results: dict[str, Any], direct: list[Any]) -> None:
        expected = mean(loss for _, _, loss, _ in direct)
        assert results["loss"] == pytest.approx(expected, rel=1e-6)
        assert results["perplexity"] == pytest.approx(math.exp(expected), rel=1e-5)

    def test_the_interval_is_that_of_the_windows(self, results: dict[str, Any], direct: list[Any]) -> None:
        losses = np.array([loss for _, _, loss, _ in direct])
        windows = [losses[start : start + T] for start in range(0, len(losses), T)]
        residues = [window.sum() - len(window) * losses.mean() for window in windows]
        half = 1.96 * np.sqrt(np.sum(np.square(residues)) * len(windows) / (len(windows) - 1)) / len(losses)
        assert results["loss_interval"] == pytest.approx([losses.mean() - half, losses.mean() + half], rel=1e-4)
        assert results["perplexity_interval"][1] == pytest.approx(math.exp(losses.mean() + half), rel=1e-3)

    def test_every_target_is_scored(self, results: dict[str, Any]) -> None:
        assert results["target_tokens"] == TOKENS - 1
        assert results["documents"] == 4

    def test_bits_per_byte_are_of_the_text_alone(self, results: dict[str, Any], direct: list[Any]) -> None:
        assert sum(target == END_OF_TEXT for _, target, _, _ in direct) >= 3
        nats = sum(loss for _, target, loss, _ in direct if target != END_OF_TEXT)
        assert results["bits_per_byte"] == pytest.approx(nats / math.log(2) / UTF8_BYTES, rel=1e-6)

    def test_accuracy(self, results: dict[str, Any], direct: list[Any]) -> None:
        top1, top5 = (mean(rank < k for *_, rank in direct) for k in (1, 5))
        assert 0 < top1 < top5 < 1
        assert results["top1_accuracy"] == pytest.approx(top1)
        assert results["top5_accuracy"] == pytest.approx(top5)

    def test_loss_by_position(self, results: dict[str, Any], direct: list[Any]) -> None:
        expected = [mean(loss for at, _, loss, _ in direct if at == position) for position in range(T)]
        assert results["loss_by_position"] == pytest.approx(expected, rel=1e-6)

    @pytest.mark.parametrize("batch_size", [1, 3, 11, 50])
    def test_the_batch_size_does_not_matter(
        self, model: GPT2, stream: TokenStream, results: dict[str, Any], batch_size: int
    ) -> None:
        other = evaluate_validation(model, stream, T, batch_size, "fp32", ALONE)
        assert other.keys() == results.keys()
        for key in ("loss", "bits_per_byte", "top1_accuracy", "top5_accuracy", "target_tokens", "loss_by_position"):
            assert other[key] == pytest.approx(results[key], rel=1e-6), key

    @pytest.mark.parametrize("size", [2, 3, 4])
    def test_the_ranks_share_the_work(
        self, model: GPT2, stream: TokenStream, results: dict[str, Any], size: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The sums of all ranks, added up by hand, give the result of one."""
        sums: list[list[torch.Tensor]] = []

        def collect(_world: World, values: torch.Tensor) -> torch.Tensor:
            sums[-1].append(values)
            return torch.ones_like(values) if len(sums) < size else torch.stack([part.pop(0) for part in sums]).sum(0)

        monkeypatch.setattr(World, "sum", collect)
        for rank in range(size):
            sums.append([])
            together = evaluate_validation(model, stream, T, 2, "fp32", World(rank, size, rank, ALONE.device))
        assert together["loss"] == pytest.approx(results["loss"], rel=1e-6)
        assert together["target_tokens"] == TOKENS - 1

    def test_a_position_that_no_window_reaches_has_no_loss(self, model: GPT2, data: Path, tmp_path: Path) -> None:
        folder = write_shards(tmp_path / "short", {"val": [np.arange(6)]})
        losses = evaluate_validation(model, open_split(folder, "val"), T, 2, "fp32", ALONE)["loss_by_position"]
        assert all(isinstance(loss, float) for loss in losses[:5])
        assert losses[5:] == [None] * 7


class TestMasks:
    MASK = np.random.default_rng(1).random(TOKENS) < 0.5

    @pytest.fixture
    def masked(self, data: Path, tmp_path: Path) -> Path:
        tokens = open_split(data, "val").read(0, TOKENS)
        shards, masks = np.split(tokens, [70]), np.split(self.MASK, [70])
        return write_shards(tmp_path / "masked", {"val": shards}, masks={"val": masks})

    def test_only_scored_targets_count(self, model: GPT2, masked: Path, direct: list[Any]) -> None:
        results = evaluate_validation(model, open_split(masked, "val"), T, 4, "fp32", ALONE)
        scored = [found for found, is_scored in zip(direct, self.MASK[1:], strict=True) if is_scored]
        assert results["loss"] == pytest.approx(mean(loss for _, _, loss, _ in scored), rel=1e-6)
        assert results["target_tokens"] == len(scored) == self.MASK[1:].sum()
        assert results["bits_per_byte"] is None

    def test_a_split_without_a_scored_target_has_no_loss(self, model: GPT2, tmp_path: Path) -> None:
        tokens = np.arange(40)
        folder = write_shards(tmp_path / "none", {"val": [tokens]}, masks={"val": [np.zeros(40, dtype=np.bool_)]})
        with pytest.raises(TrainingError, match="the split 'val' has no scored target"):
            evaluate_validation(model, open_split(folder, "val"), T, 4, "fp32", ALONE)


@pytest.fixture
def run_folder(tmp_path: Path, data: Path, world: World) -> Path:
    """A run whose only checkpoint holds a model of one step."""
    config = tiny_config(tmp_path / "run", data={"path": str(data)})
    backend = DdpBackend(restless_model(config.model), config, world)
    state = TrainingState(7, 28, 336, 7, 1.0, 0, config.run.seed)
    save_checkpoint(tmp_path / "run", state, dump_config(config), backend, world, 1)
    return tmp_path / "run"


class TestTasks:
    def test_results_are_written(self, run_folder: Path, results: dict[str, Any]) -> None:
        found, folder = run_tasks(run_folder, ["validation"], EvaluationOptions(), ALONE)
        assert folder == run_folder / "evaluation"
        written = json.loads((folder / "validation.json").read_text())
        assert written == found["validation"]
        assert written["loss"] == pytest.approx(results["loss"], rel=1e-6)
        assert written["step"] == 7
        assert Path(written["checkpoint"]) == run_folder / "checkpoints" / "step_00000007"

    def test_on_a_cpu_weights_are_packed_in_the_dtype_of_the_products(
        self, run_folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        packed = []
        monkeypatch.setattr(tasks, "pack_linear_layers", lambda model, dtype: packed.append(dtype))
        for precision in ("fp32", "amp_bf16", "bf16"):
            run_tasks(run_folder, ["validation"], EvaluationOptions(precision=precision), ALONE)
        assert packed == [torch.float32, torch.bfloat16, torch.bfloat16]

    def test_results_are_drawn(self, run_folder: Path) -> None:
        found, _ = run_tasks(run_folder, ["validation"], EvaluationOptions(), ALONE)
        events = EventAccumulator(str(run_folder / "tensorboard"))
        events.Reload()
        for key in ("loss", "perplexity", "bits_per_byte", "top1_accuracy", "top5_accuracy"):
            (scalar,) = events.Scalars(f"evaluation/validation_{key}")
            assert scalar.step == 7
            assert scalar.value == pytest.approx(found["validation"][key], rel=1e-5)

    def test_a_checkpoint_that_was_moved_keeps_its_results_itself(self, run_folder: Path, tmp_path: Path) -> None:
        moved = (run_folder / "checkpoints" / "step_00000007").rename(tmp_path / "moved")
        _, folder = run_tasks(moved, ["validation"], EvaluationOptions(batch_size=3), ALONE)
        assert folder == moved / "evaluation"
        assert load_model(moved, ALONE.device).step == 7, "results beside it do not damage it"

    def test_other_data_can_be_scored(self, run_folder: Path, tmp_path: Path) -> None:
        other = write_shards(tmp_path / "other", {"val": [np.arange(30)]})
        found, _ = run_tasks(run_folder, ["validation"], EvaluationOptions(data={"validation": str(other)}), ALONE)
        assert found["validation"]["target_tokens"] == 29
        assert found["validation"]["data"] == str(other)

    def test_a_mixture_is_scored_part_by_part(self, data: Path, tmp_path: Path, world: World) -> None:
        """The loss is the mean by weight; a part without a validation split is left out."""
        other = write_shards(tmp_path / "other", {"val": [np.arange(60)], "train": [np.arange(60)]})
        train_only = write_shards(tmp_path / "train_only", {"train": [np.arange(60)]})
        parts = [(data, "first", 3.0), (other, "second", 1.0), (train_only, "third", 5.0)]
        mixture = [{"path": str(path), "name": name, "weight": weight} for path, name, weight in parts]
        config = tiny_config(tmp_path / "run", data={"mixture": mixture})
        backend = DdpBackend(restless_model(config.model), config, world)
        state = TrainingState(7, 28, 336, 7, 1.0, 0, config.run.seed)
        save_checkpoint(tmp_path / "run", state, dump_config(config), backend, world, 1)

        found, _ = run_tasks(tmp_path / "run", ["validation"], EvaluationOptions(), ALONE)
        result = found["validation"]
        assert set(result["parts"]) == {"first", "second"}
        for name, path in (("first", data), ("second", other)):
            alone, _ = run_tasks(
                tmp_path / "run", ["validation"], EvaluationOptions(data={"validation": str(path)}), ALONE
            )
            assert result["parts"][name]["loss"] == alone["validation"]["loss"] == result[f"{name}_loss"]
        assert result["loss"] == pytest.approx(0.75 * result["first_loss"] + 0.25 * result["second_loss"])
        assert "first_loss" in format_table(found)

    def test_the_loaded_model_is_the_saved_one(self, run_folder: Path) -> None:
        loaded = load_model(run_folder, ALONE.device)
        expected = restless_model(tiny_model_config())
        assert all(torch.equal(loaded.model.get_parameter(name), p) for name, p in expected.named_parameters())
        assert not loaded.model.training
        loaded.model.assert_tied()

    def test_an_unknown_task_names_the_known_ones(self, run_folder: Path) -> None:
        with pytest.raises(ConfigError, match="--tasks squad: no such task; there are: validation"):
            run_tasks(run_folder, ["squad"], EvaluationOptions(), ALONE)

    def test_no_checkpoint(self, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match="no checkpoint here"):
            run_tasks(tmp_path, ["validation"], EvaluationOptions(), ALONE)

    def test_data_without_a_validation_split(self, run_folder: Path, tmp_path: Path) -> None:
        only_train = write_shards(tmp_path / "other", {"train": [np.arange(30)]})
        with pytest.raises(DataError, match="no split 'val'"):
            run_tasks(run_folder, ["validation"], EvaluationOptions(data={"validation": str(only_train)}), ALONE)


class TestResults:
    RESULT = {
        "task": "validation",
        "checkpoint": "runs/x/checkpoints/step_00000007",
        "step": 7,
        "loss": 3.25,
        "target_tokens": 1234567,
        "loss_by_position": [8.0, 6.0, 5.0, 4.0, 3.0, 3.0, None],
    }

    def test_a_table_has_a_line_a_number(self) -> None:
        assert [line.split() for line in format_table({"validation": self.RESULT}).splitlines()] == [
            ["validation", "(step", "7,", "runs/x/checkpoints/step_00000007)"],
            ["loss", "3.2500"],
            ["target_tokens", "1,234,567"],
            ["loss", "at", "0", "8.0000"],
            ["loss", "at", "1", "6.0000"],
            ["loss", "at", "2-3", "4.5000"],
            ["loss", "at", "4-6", "3.0000"],
        ]

    def test_numbers_stand_under_each_other(self) -> None:
        _, *lines = format_table({"validation": self.RESULT}).splitlines()
        assert len({len(line) for line in lines}) == 1

    def test_results_of_this_step_are_found_again(self, run_folder: Path) -> None:
        assert find_results(run_folder, ["validation"], 7) is None
        found, _ = run_tasks(run_folder, ["validation"], EvaluationOptions(), ALONE)
        assert find_results(run_folder, ["validation"], 7) == found
        assert find_results(run_folder, ["validation"], 8) is None
        assert find_results(run_folder, ["validation", "other"], 7) is None
