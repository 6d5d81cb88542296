"""A run says at its start which validation split it measures. On a GPU, it has the curve of a CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data_tools.errors import DataError
from pipeline.checkpoint.layout import checkpoint_folder
from pipeline.checkpoint.retention import list_leftovers
from pipeline.config.loading import config_from_json
from pipeline.errors import CheckpointError
from pipeline.model.initialisation import draw_elements
from pipeline.run_folder.metrics import read_metrics
from pipeline.training.run import train
from tests.pipeline.conftest import largest_file
from tests.support.runs import TINY_RUN, Sections, copy_with_masks, merged
from tests.support.token_files import documents, write_ours


def log_of_a_run(folder: Path, splits: dict[str, list[np.ndarray]], caplog: pytest.LogCaptureFixture) -> str:
    """Train for one step on these tokens, and return what the run logs."""
    write_ours(folder / "data", splits)
    return log_of_a_start(folder, {}, caplog)


def log_of_a_start(folder: Path, more: Sections, caplog: pytest.LogCaptureFixture) -> str:
    """Start the run of one step, and return what it logs."""
    caplog.clear()
    changes: Sections = {
        "run": {"out_dir": str(folder / "run"), "compile": False},
        "model": {"n_layer": 1, "n_head": 1, "n_embd": 8, "context_length": 16},
        "data": {"path": str(folder / "data")},
        "batch": {"tokens_per_step": 32},
        "schedule": {"warmup_steps": 0, "max_steps": 1},
    }
    with caplog.at_level("INFO"):
        train(config_from_json(merged(TINY_RUN, changes, more), "test"))
    return caplog.text


def test_a_run_states_its_validation_split(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    log = log_of_a_run(tmp_path, {"train": [documents(50)], "val": [np.arange(1000, dtype=np.uint16)]}, caplog)
    assert "validation: 1,000 tokens, 63 windows of 16, 8 of them per evaluation" in log
    assert "the validation split has 1,000 tokens in 0 documents" in log
    assert "losses on fewer than 16,384 tokens are noisy" in log and "windows before" not in log
    smaller: Sections = {"batch": {"micro_batch_size": 1}, "schedule": {"max_steps": 2}}
    log = log_of_a_start(tmp_path, smaller, caplog)
    assert "63 windows of 16, 4 of them per evaluation" in log and "read 8 validation windows before" in log
    assert "windows before" not in log_of_a_start(tmp_path, merged(smaller, {"schedule": {"max_steps": 3}}), caplog)


def test_a_start_on_a_full_disk_changes_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The later checkpoints keep their names, and the metrics keep their rows."""
    write_ours(tmp_path / "data", {"train": [documents(50)]})
    longer: Sections = {"schedule": {"max_steps": 3}, "checkpoint": {"every_steps": 1, "keep_last": 3}}
    log_of_a_start(tmp_path, longer, caplog)
    run_folder = tmp_path / "run"
    (run_folder / "heartbeat.json").unlink()  # each start writes it
    before = contents_of(run_folder)
    back = merged(longer, {"checkpoint": {"resume": str(checkpoint_folder(run_folder, 1))}})
    with largest_file(200), pytest.raises(CheckpointError, match="config.json") as error:
        log_of_a_start(tmp_path, back, caplog)
    assert len(str(error.value).splitlines()) == 1
    assert contents_of(run_folder) == before


def contents_of(folder: Path) -> dict[Path, bytes]:
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_resumed_run_records_the_settings_that_have_changed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The model card of an export lists them."""
    log_of_a_run(tmp_path, {"train": [documents(50)]}, caplog)
    log = log_of_a_start(tmp_path, {"schedule": {"max_steps": 2}, "optimizer": {"weight_decay": 0.3}}, caplog)
    starts = [row["started"] for row in read_metrics(tmp_path / "run") if "started" in row]
    assert "changed" not in starts[0]
    assert starts[1]["changed"] == ["optimizer.weight_decay 0.1 -> 0.3", "schedule.max_steps 1 -> 2"]
    assert all(f"changed   {change}" in log for change in starts[1]["changed"])


def test_a_run_without_a_validation_split_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    log = log_of_a_run(tmp_path, {"train": [documents(50)]}, caplog)
    assert "has no validation split: this run has no validation loss for it" in log
    assert "validation:" not in log


def test_a_complete_run_sends_what_a_service_does_not_have(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The service was not in the list when the run trained, or it was away."""
    mlflow = pytest.importorskip("mlflow", reason="needs the extra mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file://{tmp_path}/mlflow")
    log_of_a_run(tmp_path, {"train": [documents(50)]}, caplog)
    rows = read_metrics(tmp_path / "run")
    services: Sections = {"logging": {"sinks": ["mlflow"], "project": "late"}}
    assert "mlflow: sending what it does not have yet" in log_of_a_start(tmp_path, services, caplog)
    log = log_of_a_start(tmp_path, services, caplog)
    assert "nothing to train" in log and "mlflow" not in log
    client = mlflow.MlflowClient()
    (run,) = client.search_runs([client.get_experiment_by_name("late").experiment_id])
    (loss,) = client.get_metric_history(run.info.run_id, "loss")
    assert [(loss.step, loss.value)] == [(row["step"], row["loss"]) for row in rows if "loss" in row]
    assert run.info.status == "FINISHED" and run.data.metrics["final/loss"] == loss.value
    assert read_metrics(tmp_path / "run") == rows, "a complete run is not changed"


def test_only_a_new_run_draws_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_ours(tmp_path / "data", {"train": [documents(50)]})
    drawn: list[str] = []

    def draw(name: str, *arguments: Any) -> None:
        drawn.append(name)
        draw_elements(name, *arguments)

    monkeypatch.setattr("pipeline.backends.base.draw_elements", draw)
    monkeypatch.setattr("pipeline.model.gpt2.draw_elements", draw)
    losses_of_a_run(tmp_path / "run", tmp_path / "data", {"schedule": {"max_steps": 4}})
    assert "wte.weight" in drawn
    assert len(set(drawn)) == len(drawn), "each weight is drawn once"
    drawn.clear()
    assert losses_of_a_run(tmp_path / "run", tmp_path / "data", {}).keys() == {1, 4, 8}
    assert not drawn


def names_of_checkpoints(run_folder: Path) -> list[str]:
    return sorted(path.name for path in (run_folder / "checkpoints").iterdir())


class TestAStartThatTrainsNothing:
    """A start from an earlier checkpoint leaves the later checkpoints and their metrics unless it trains."""

    @pytest.fixture
    def trained(self, tmp_path: Path) -> Path:
        """Return the folder of a run with checkpoints of steps 4 and 8."""
        write_ours(tmp_path / "data", {"train": [documents(50)], "val": [np.arange(500, dtype=np.uint16)]})
        losses_of_a_run(tmp_path / "run", tmp_path / "data", {"evaluation": {"every_steps": 4}})
        return tmp_path / "run"

    def assert_unchanged(self, run_folder: Path, metrics: list[dict[str, Any]]) -> None:
        assert names_of_checkpoints(run_folder) == ["step_00000004", "step_00000008"]
        assert read_metrics(run_folder) == metrics

    def test_an_early_stop_is_in_force(self, trained: Path, caplog: pytest.LogCaptureFixture) -> None:
        metrics = read_metrics(trained)
        changes: Sections = {
            "checkpoint": {"resume": str(checkpoint_folder(trained, 4))},
            "schedule": {"stop_at_val_loss": 99.0},
        }
        with caplog.at_level("INFO"):
            losses_of_a_run(trained, trained.parent / "data", changes)
        assert "at step 4, nothing to train: validation loss" in caplog.text
        self.assert_unchanged(trained, metrics)

    def test_a_complete_run_is_tidied(self, trained: Path) -> None:
        """The last save of the run was complete, and the deletion of an older checkpoint was interrupted."""
        metrics = read_metrics(trained)
        (trained / "checkpoints" / ".step_00000002.deleted.partial").mkdir()
        losses_of_a_run(trained, trained.parent / "data", {})
        self.assert_unchanged(trained, metrics)
        assert list_leftovers(trained) == []

    def test_the_data_is_damaged(self, trained: Path) -> None:
        metrics = read_metrics(trained)
        data = trained.parent / "data"
        (shard,) = data.glob("train_*.npy")
        content = bytearray(shard.read_bytes())
        content[-2] ^= 1
        shard.write_bytes(content)
        changes: Sections = {
            "checkpoint": {"resume": str(checkpoint_folder(trained, 4))},
            "data": {"verify": True},
        }
        with pytest.raises(DataError):
            losses_of_a_run(trained, data, changes)
        self.assert_unchanged(trained, metrics)


def losses_of_a_run(folder: Path, data: Path, changes: Sections) -> dict[int, float]:
    """Train for eight steps, four micro-batches each, and return the losses of steps 1, 4 and 8."""
    sections: Sections = {
        "run": {"out_dir": str(folder), "compile": False},
        "model": {"n_layer": 1, "n_head": 2, "n_embd": 32, "context_length": 16},
        "data": {"path": str(data)},
        "batch": {"tokens_per_step": 128},
        "schedule": {"warmup_steps": 2, "max_steps": 8},
        "checkpoint": {"every_steps": 4, "keep_last": 9},
        "logging": {"every_steps": 4},
    }
    train(config_from_json(merged(TINY_RUN, sections, changes), "test"))
    return {row["step"]: row["loss"] for row in read_metrics(folder) if "loss" in row}


@pytest.mark.gpu
def test_a_run_on_a_gpu_has_the_curve_of_a_cpu(tmp_path: Path, gpu: torch.device) -> None:
    """With masked targets, whose number is on the device, and with steps whose loss is read later."""
    tokens = {"train": [documents(50)], "val": [np.arange(1000, dtype=np.uint16)]}
    write_ours(tmp_path / "tokens", tokens)
    data = copy_with_masks(tmp_path / "tokens", tmp_path / "data", 10)
    expected = losses_of_a_run(tmp_path / "cpu", data, {})
    for precision, tolerance in (("fp32", 1e-4), ("amp_fp16", 2e-2), ("amp_bf16", 2e-2)):
        run = {"device": gpu.type, "precision": precision}
        assert losses_of_a_run(tmp_path / precision, data, {"run": run}) == pytest.approx(expected, abs=tolerance)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_run_on_a_gpu_resumes_bit_for_bit(tmp_path: Path, gpu: torch.device, precision: str) -> None:
    """With dropout and recomputation, whose masks depend on the samples only."""
    write_ours(tmp_path / "data", {"train": [documents(50)]})
    changes: Sections = {
        "run": {"device": gpu.type, "precision": precision},
        "model": {"dropout": 0.1, "activation_checkpointing": True},
    }
    whole = losses_of_a_run(tmp_path / "whole", tmp_path / "data", changes)
    start: Sections = {"checkpoint": {"resume": str(checkpoint_folder(tmp_path / "whole", 4))}}
    resumed = losses_of_a_run(tmp_path / "resumed", tmp_path / "data", merged(changes, start))
    assert resumed == {8: whole[8]}
