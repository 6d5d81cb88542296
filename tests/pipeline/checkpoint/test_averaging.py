"""The mean of several checkpoints as a new run."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from data_tools.errors import DataError
from pipeline.backends.ddp import DdpBackend
from pipeline.checkpoint import averaging
from pipeline.checkpoint.averaging import average_checkpoints
from pipeline.checkpoint.inspection import inspect
from pipeline.checkpoint.layout import checkpoint_folder, list_checkpoints
from pipeline.checkpoint.loading import load_model, load_training_state
from pipeline.checkpoint.retention import delete_checkpoint
from pipeline.checkpoint.state import read_state, read_state_file
from pipeline.checkpoint.verification import find_damage
from pipeline.config.loading import load_config
from pipeline.distributed.world import World
from pipeline.errors import CheckpointError
from tests.pipeline.checkpoint.conftest import (
    STATE,
    WEIGHTS,
    Save,
    edit_tensors,
    make_backend,
    stored_tensors,
    train_steps,
)
from tests.support.checkpoints import save_checkpoint


@pytest.fixture
def run(save: Save, backend: DdpBackend, tmp_path: Path) -> Path:
    """Return a run with checkpoints of steps 3, 5 and 8, after 3, 4 and 5 updates."""
    for step in (3, 5, 8):
        save(step)
        train_steps(backend, 1, first_seed=step)
    return tmp_path


def mean_in_fp64(run: Path, steps: list[int]) -> dict[str, torch.Tensor]:
    stored = [stored_tensors(checkpoint_folder(run, step)) for step in steps]
    weights = [name for name in stored[0] if name.startswith("weight ")]
    return {name: sum(tensors[name].double() for tensors in stored).float() / len(stored) for name in weights}


class TestMean:
    def test_the_weights_are_the_mean_and_the_rest_is_the_newest(self, run: Path) -> None:
        folder = average_checkpoints(run, run / "mean", last=2).folder
        assert folder == checkpoint_folder(run / "mean", 8) and find_damage(folder) is None
        newest, averaged = stored_tensors(checkpoint_folder(run, 8)), stored_tensors(folder)
        expected = {**newest, **mean_in_fp64(run, [5, 8])}
        assert averaged.keys() == expected.keys()
        for name, tensor in expected.items():
            assert averaged[name].dtype == torch.float32
            torch.testing.assert_close(averaged[name], tensor, rtol=1e-7, atol=0, msg=name)
        assert not torch.equal(averaged["weight wte.weight"], newest["weight wte.weight"])
        assert read_state(folder) == read_state(checkpoint_folder(run, 8))

    def test_the_mean_has_no_evaluation_to_repeat(self, run: Path, backend: DdpBackend, world: World) -> None:
        state, config = read_state(checkpoint_folder(run, 8))
        stopped = replace(state, step=9, evaluation_is_due=True)
        save_checkpoint(run, stopped, config, backend, world, keep_last=9)
        folder = average_checkpoints(run, run / "mean", last=2).folder
        assert not read_state(folder)[0].evaluation_is_due

    def test_the_steps_are_chosen_and_recorded(self, run: Path) -> None:
        folder = average_checkpoints(run, run / "mean", steps=[8, 3, 8]).folder
        assert read_state_file(folder).averaged_steps == (3, 8)
        assert json.loads((folder / STATE).read_text())["averaged_steps"] == [3, 8]
        assert "  weights    mean of steps 3, 8\n" in str(inspect(folder))
        assert "mean of" not in str(inspect(checkpoint_folder(run, 8)))
        assert str(inspect(run / "mean")).endswith("sizes match, weights: mean of steps 3, 8")
        assert "mean of" not in str(inspect(run))
        for name, tensor in mean_in_fp64(run, [3, 8]).items():
            torch.testing.assert_close(stored_tensors(folder)[name], tensor, rtol=1e-7, atol=0)

    def test_the_sum_is_in_fp64(self, run: Path) -> None:
        """In fp32, 1 would vanish beside 2^24, and the mean would be 0 instead of 1/3."""
        for step, value in ((3, 2.0**24), (5, 1.0), (8, -(2.0**24))):
            edit_tensors(checkpoint_folder(run, step), WEIGHTS, lambda tensors, x=value: tensors["wpe.weight"].fill_(x))
        folder = average_checkpoints(run, run / "mean", last=3).folder
        assert stored_tensors(folder)["weight wpe.weight"].unique().tolist() == [pytest.approx(1 / 3)]

    def test_the_new_run_loads_and_trains(self, run: Path, world: World) -> None:
        average_checkpoints(run, run / "mean", last=3)
        assert load_config([run / "mean" / "config.json"]).run.out_dir == str(run / "mean")
        loaded = load_model(run / "mean", torch.device("cpu"))
        backend = make_backend(world, seed=7)
        assert load_training_state(loaded.checkpoint, backend).step == 8
        for name, parameter in loaded.model.named_parameters():
            assert torch.equal(parameter, backend.model.get_parameter(name)), name
        train_steps(backend, 1)


class TestMovingAverages:
    @pytest.fixture
    def averaging(self, world: World) -> DdpBackend:
        return make_backend(world, seed=1, averaging={"ema": 0.9})

    def test_they_are_averaged_like_the_weights(self, save: Save, averaging: DdpBackend, tmp_path: Path) -> None:
        for step in (3, 5):
            train_steps(averaging, 2, first_seed=step, ema_decay=0.9)
            save(step, of=averaging)
        folder = average_checkpoints(tmp_path, tmp_path / "mean", last=2).folder
        averaged, stored = stored_tensors(folder), [stored_tensors(checkpoint_folder(tmp_path, n)) for n in (3, 5)]
        for name in (name for name in averaged if name.startswith("ema ")):
            expected = (sum(tensors[name].double() for tensors in stored) / 2).float()
            torch.testing.assert_close(averaged[name], expected, rtol=1e-7, atol=0, msg=name)
        assert not torch.equal(averaged["ema wte.weight"], stored[1]["ema wte.weight"])
        model = load_model(tmp_path / "mean", torch.device("cpu"), "ema").model
        assert torch.equal(model.wte.weight, averaged["ema wte.weight"])

    def test_without_one_in_each_checkpoint_there_is_none(
        self, save: Save, averaging: DdpBackend, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        save(3)
        train_steps(averaging, 2, ema_decay=0.9)
        save(5, of=averaging)
        with caplog.at_level("INFO"):
            folder = average_checkpoints(tmp_path, tmp_path / "mean", last=2).folder
        assert "some of the checkpoints have no moving average of the weights, so the new run has none" in caplog.text
        assert not any(name.startswith("ema ") for name in stored_tensors(folder))
        with caplog.at_level("INFO"):
            assert load_training_state(folder, averaging).step == 5
        assert "the average starts as a copy of the weights" in caplog.text


class TestMistakes:
    def refused(self, run: Path, message: str, out: str = "mean", **chosen: object) -> None:
        with pytest.raises(CheckpointError, match=message) as refusal:
            average_checkpoints(run, run / out, **chosen)  # type: ignore[arg-type]
        assert "\n" not in str(refusal.value)
        assert not (run / "mean").exists()

    def test_too_few_checkpoints(self, run: Path) -> None:
        self.refused(run, r"has fewer than 5 checkpoints \(those of steps 3, 5, 8\); give a smaller --last", last=5)
        self.refused(run, "--last: a mean needs at least two checkpoints, 1 is asked for", last=1)
        self.refused(run, "--steps: a mean needs at least two checkpoints, 1 is named", steps=[3, 3])
        self.refused(run, "no checkpoint of step 4; it has steps 3, 5, 8", steps=[3, 4])

    def test_other_folders(self, run: Path, tmp_path: Path) -> None:
        self.refused(checkpoint_folder(run, 3), "is a checkpoint; give the run folder that holds it", last=2)
        (tmp_path / "empty").mkdir()
        self.refused(tmp_path / "empty", "no checkpoint here; expected a run folder", last=2)
        (tmp_path / "shards").mkdir()
        (tmp_path / "shards" / "manifest.json").write_text('{"shards": []}')
        self.refused(tmp_path / "shards", "no checkpoint here, the folder holds token shards; expected a run", last=2)
        self.refused(run, r"already has checkpoints \(step_00000008\); name another folder", out=".", last=2)

    def test_a_damaged_checkpoint(self, run: Path) -> None:
        content = bytearray((checkpoint_folder(run, 5) / WEIGHTS).read_bytes())
        content[-1] ^= 1
        (checkpoint_folder(run, 5) / WEIGHTS).write_bytes(content)
        self.refused(run, r"step_00000005/rank_00000_weights.safetensors: contents changed.*; leave .* --steps", last=3)
        average_checkpoints(run, run / "mean", steps=[3, 8])  # the advice

    def test_other_shapes(self, run: Path, save: Save, world: World) -> None:
        save(9, of=make_backend(world, seed=1, model={"n_layer": 1}))
        self.refused(run, r"step_00000008: h.1.ln_1.weight has shape \[21\], and none in step_00000009", last=2)
        assert len(list_checkpoints(run)) == 4


def test_a_checkpoint_that_the_run_deletes_is_an_error_that_says_so(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    oldest = checkpoint_folder(run, 3)

    def delete_and_read(*_: object) -> None:
        delete_checkpoint(oldest)
        read_state(oldest)

    monkeypatch.setattr(averaging, "read_state", delete_and_read)
    with pytest.raises(CheckpointError, match="step_00000003 was deleted while it was read.*; repeat the"):
        average_checkpoints(run, run / "mean", last=3)
    monkeypatch.undo()
    average_checkpoints(run, run / "mean", last=2)


def test_a_new_run_without_its_config_gets_no_checkpoint(run: Path) -> None:
    """Otherwise, the command could not be repeated."""
    blocked = run / "mean" / "config.json"
    blocked.mkdir(parents=True)
    with pytest.raises(DataError, match=r"cannot write .*config.json: Is a directory"):
        average_checkpoints(run, run / "mean", last=2)
    blocked.rmdir()
    average_checkpoints(run, run / "mean", last=2)
