"""Files are written as documented; a failed save is a one-line error and changes nothing."""

from __future__ import annotations

import importlib
import json
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open

from data_tools.errors import PROJECT
from pipeline.backends.ddp import DdpBackend
from pipeline.checkpoint import saving
from pipeline.checkpoint.background import SnapshotTaker
from pipeline.checkpoint.layout import list_checkpoints
from pipeline.checkpoint.manifest import read_manifest
from pipeline.checkpoint.verification import find_damage, newest_good_checkpoint
from pipeline.config.loading import dump_config
from pipeline.distributed.world import World
from pipeline.errors import CheckpointError
from pipeline.model.gpt2 import build_model
from tests.pipeline.checkpoint.conftest import FILES, MOMENTS, WEIGHTS, Save, state_of, unchanged
from tests.pipeline.conftest import largest_file, tiny_config, tiny_model_config


def files_of(run_folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in run_folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("size_bytes", [0, 100, 20_000])  # fails at once, in all files, and in the weights
def test_a_full_disk_leaves_the_old_checkpoint_unchanged(
    save: Save, backend: DdpBackend, tmp_path: Path, size_bytes: int
) -> None:
    older = save(1)
    before = files_of(tmp_path)
    with unchanged(backend), largest_file(size_bytes), pytest.raises(CheckpointError) as caught:
        save(2, keep_last=1)
    assert str(caught.value).startswith(f"cannot save {older.parent / 'step_00000002'}: rank 0: ")
    assert "\n" not in str(caught.value)
    assert list((tmp_path / "checkpoints").iterdir()) == [older]
    assert files_of(tmp_path) == before
    assert find_damage(older) is None
    assert newest_good_checkpoint(tmp_path) == older
    assert save(2, keep_last=1).name == "step_00000002"


def test_a_disk_with_room_for_the_weights_only(save: Save, tmp_path: Path) -> None:
    older = save(1)
    weights = (older / "rank_00000_weights.safetensors").stat().st_size
    with largest_file(weights), pytest.raises(CheckpointError, match=r"cannot save .*step_00000002: rank 0: "):
        save(2, keep_last=1)
    assert list((tmp_path / "checkpoints").iterdir()) == [older]


def test_a_full_disk_for_the_last_file(save: Save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    older = save(1)

    def no_space(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(saving, "write_json_durably", no_space)
    with pytest.raises(CheckpointError, match=r"step_00000002: rank 0: No space left on device$"):
        save(2, keep_last=1)
    assert list((tmp_path / "checkpoints").iterdir()) == [older]


def test_a_folder_that_cannot_be_created(save: Save, tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("not a folder")
    with pytest.raises(CheckpointError, match="cannot save"):
        save(1)


def test_a_temporary_name_that_a_file_has(save: Save, tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / ".step_00000001.partial").write_text("not a folder")
    with pytest.raises(CheckpointError, match=r"cannot save .*step_00000001: rank 0: "):
        save(1)
    assert save(2).name == "step_00000002"


class TestNumbersThatAreNotFinite:
    """Such a state is saved, because its other numbers may be of use. It never takes the place of a good checkpoint."""

    def test_they_are_saved_and_not_loaded(self, save: Save, backend: DdpBackend) -> None:
        """Reading back compares bits, because NaN is not equal to itself."""
        set_weight(backend, torch.nan)
        problem = find_damage(save(1))
        assert problem is not None
        assert problem.endswith("_weights.safetensors: wpe.weight: 1 of 252 numbers are NaN or infinite")

    @pytest.mark.parametrize("keep_last", [1, 2])
    def test_good_checkpoints_are_kept(self, save: Save, backend: DdpBackend, tmp_path: Path, keep_last: int) -> None:
        good = [save(step, keep_last) for step in (1, 2, 3)][-keep_last:]
        set_weight(backend, torch.inf)
        for step in (4, 5, 6):
            newest = save(step, keep_last)
            assert list_checkpoints(tmp_path) == [*good, newest], "only one such checkpoint"
            assert newest_good_checkpoint(tmp_path) == good[-1]
        set_weight(backend, 0.5)
        good = [*good, save(7, keep_last)][-keep_last:]
        assert list_checkpoints(tmp_path) == good, "the next good checkpoint replaces it"

    def test_the_result_of_the_save_says_so(self, tmp_path: Path, backend: DdpBackend, world: World) -> None:
        taker, config = SnapshotTaker(backend, world), dump_config(tiny_config())
        saved = saving.write_checkpoint(tmp_path, taker.take(state_of(backend, 1)), config, world, keep_last=1)
        assert saved.not_finite is None and "NaN" not in str(saved)
        backend.fragments()[0].state["exp_avg_sq"][0] = torch.inf
        saved = saving.write_checkpoint(tmp_path, taker.take(state_of(backend, 2)), config, world, keep_last=1)
        assert saved.not_finite == f"{MOMENTS} contains NaN or infinite numbers"
        assert str(saved).endswith(f"), but {saved.not_finite}: no run can resume from it")
        assert find_damage(saved.folder, weights="training") is None, "the weights are good"


def set_weight(backend: DdpBackend, value: float) -> None:
    with torch.no_grad():
        backend.model.wpe.weight[0, 0] = value


def test_a_save_can_be_held_for_a_rehearsal(save: Save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the case ``cut-in-save`` of ``make rehearse``, the ranks wait after they have written their own files."""
    hold_file = tmp_path / "hold"
    hold_file.touch()
    monkeypatch.setenv("HOLD_AFTER", "2")
    monkeypatch.setenv("HOLD_FILE", str(hold_file))
    held_train = importlib.import_module("tests.support.held_train")
    held: list[set[str]] = []

    def release(_: float) -> None:
        held.append({path.name for path in (tmp_path / "checkpoints" / ".step_00000002.partial").iterdir()})
        hold_file.unlink()

    monkeypatch.setattr(held_train, "time", SimpleNamespace(sleep=release))
    monkeypatch.setattr(saving, "write_tensor_files", saving.write_tensor_files)  # restored after the test
    held_train.hold_in_the_save()
    save(1)
    assert not held
    assert save(2).name == "step_00000002"
    assert held == [{WEIGHTS, MOMENTS}]


class TestFiles:
    def test_nothing_is_pickled(self, save: Save, tmp_path: Path) -> None:
        save()
        files = sorted(path for path in tmp_path.rglob("*") if path.is_file())
        assert [path.name for path in files] == FILES
        for path in files:
            if path.suffix == ".json":
                json.loads(path.read_text())
            else:
                with safe_open(path, framework="numpy") as tensors:
                    assert list(tensors.keys())

    def test_weights_are_fp32_under_gpt2s_names_and_shapes(self, save: Save, backend: DdpBackend) -> None:
        with safe_open(save() / WEIGHTS, framework="pt") as file:
            stored = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        parameters = dict(backend.model.named_parameters())
        assert stored.keys() == parameters.keys()
        for name, tensor in stored.items():
            assert tensor.dtype == torch.float32
            assert torch.equal(tensor, parameters[name])

    def test_the_tied_weight_is_stored_once(self, save: Save) -> None:
        folder = save()
        assert "lm_head.weight" not in read_manifest(folder).parameters
        stored_bytes = (folder / WEIGHTS).stat().st_size
        parameters = sum(p.numel() for p in build_model(tiny_model_config(), 1).parameters())
        assert parameters * 4 < stored_bytes < parameters * 4 + 4096

    def test_the_same_state_gives_the_same_bytes(self, save: Save) -> None:
        first = {path.name: path.read_bytes() for path in save(3).iterdir()}
        second = {path.name: path.read_bytes() for path in save(4).iterdir()}
        assert [name for name in FILES if first[name] == second[name]] == [name for name in FILES if "rank" in name]

    def test_versions_are_of_what_is_installed(self, save: Save, monkeypatch: pytest.MonkeyPatch) -> None:
        """A run under DDP saves without DeepSpeed on the machine."""
        real = saving.version

        def without_deepspeed(package: str) -> str:
            if package == "deepspeed":
                raise PackageNotFoundError(package)
            return real(package)

        monkeypatch.setattr(saving, "version", without_deepspeed)
        versions = json.loads((save() / "state.json").read_text())["versions"]
        assert versions["torch"] == real("torch")
        assert versions[PROJECT] == real(PROJECT), "the program that wrote the checkpoint"
        assert "deepspeed" not in versions
