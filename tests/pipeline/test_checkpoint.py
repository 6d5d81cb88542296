"""A checkpoint brings back exactly what was saved, and a damaged or foreign one is never used.

Here in one process; other backends and world sizes have tests of their own.
"""

from __future__ import annotations

import hashlib
import json
import logging
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from pipeline.backends import Backend, Fragment
from pipeline.backends.ddp import DdpBackend
from pipeline.checkpoint import (
    TrainingState,
    find_damage,
    list_checkpoints,
    load_training_state,
    load_weights,
    locate_checkpoint,
    newest_good_checkpoint,
    read_manifest,
    read_state,
    save_checkpoint,
    saving,
)
from pipeline.config_files import dump_config
from pipeline.distributed import World
from pipeline.errors import CheckpointError
from pipeline.model import build_model
from tests.pipeline.conftest import random_tokens, tiny_config, tiny_model_config

FILES = ["manifest.json", "rank_00000_moments.safetensors", "rank_00000_weights.safetensors", "state.json"]

Save = Callable[..., Path]


def make_backend(world: World, seed: int, **sections: dict[str, Any]) -> DdpBackend:
    config = tiny_config(**sections)
    return DdpBackend(build_model(config.model, seed), config, world)


def train_steps(backend: Backend, steps: int, first_seed: int = 0) -> None:
    for seed in range(first_seed, first_seed + steps):
        tokens = random_tokens(2, 9, seed=seed)
        backend.accumulate(tokens[:, :-1], tokens[:, 1:], 1 / 16, is_last=True)
        backend.step(1e-2)


def state_of(backend: Backend, step: int) -> TrainingState:
    scaler = backend.loss_scaler
    return TrainingState(step, step * 4, step * 48, backend.updates, scaler.scale, scaler.good_steps, seed=1337)


def contents(backend: Backend) -> dict[str, torch.Tensor]:
    """Weights and moments by name, as copies."""
    return {
        f"{fragment.name} {kind}": getattr(fragment, kind).clone()
        for fragment in backend.fragments()
        for kind in ("weight", "exp_avg", "exp_avg_sq")
    }


def assert_same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


@pytest.fixture
def backend(world: World) -> DdpBackend:
    """A model with three steps of training behind it."""
    trained = make_backend(world, seed=1)
    train_steps(trained, 3)
    return trained


@pytest.fixture
def save(tmp_path: Path, world: World, backend: DdpBackend) -> Save:
    def save_step(step: int = 3, keep_last: int = 10, of: DdpBackend = backend) -> Path:
        return save_checkpoint(tmp_path, state_of(of, step), dump_config(tiny_config()), of, world, keep_last)

    return save_step


def edit_manifest(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the manifest as someone would who knows how to seal it."""
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["sha256"]
    change(manifest)
    manifest["sha256"] = hashlib.sha256(json.dumps(manifest).encode()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(manifest))


class TestRoundTrip:
    def test_weights_moments_and_step_come_back(self, save: Save, backend: DdpBackend, world: World) -> None:
        folder = save()
        other = make_backend(world, seed=2)
        assert not torch.equal(other.model.wte.weight, backend.model.wte.weight)
        state = load_training_state(folder, other)
        assert state == state_of(backend, 3)
        assert other.updates == 3
        assert_same(contents(other), contents(backend))
        other.model.assert_tied()

    def test_training_goes_on_as_if_never_stopped(self, save: Save, backend: DdpBackend, world: World) -> None:
        folder = save()
        other = make_backend(world, seed=2)
        load_training_state(folder, other)
        for trained in (backend, other):
            train_steps(trained, 3, first_seed=50)
        assert_same(contents(other), contents(backend))

    def test_a_checkpoint_of_an_untrained_model(self, save: Save, world: World) -> None:
        fresh, other = make_backend(world, seed=5), make_backend(world, seed=6)
        load_training_state(save(0, of=fresh), other)
        for trained in (fresh, other):
            train_steps(trained, 2)
        assert_same(contents(other), contents(fresh))

    def test_the_loss_scale_comes_back(self, tmp_path: Path, world: World) -> None:
        scaled = make_backend(world, seed=1, run={"precision": "amp_fp16"})
        scaled.loss_scaler.scale, scaled.loss_scaler.good_steps = 1024.0, 77
        folder = save_checkpoint(tmp_path, state_of(scaled, 1), {}, scaled, world, 1)
        other = make_backend(world, seed=2, run={"precision": "amp_fp16"})
        load_training_state(folder, other)
        assert (other.loss_scaler.scale, other.loss_scaler.good_steps) == (1024.0, 77)
        unscaled = make_backend(world, seed=2)
        load_training_state(folder, unscaled)
        assert unscaled.loss_scaler.scale == 1.0

    def test_the_weights_alone(self, save: Save, backend: DdpBackend) -> None:
        folder = save()
        model = build_model(tiny_model_config(), 9)
        load_weights(folder, {name: parameter.detach() for name, parameter in model.named_parameters()})
        for name, parameter in backend.model.named_parameters():
            assert torch.equal(model.get_parameter(name), parameter), name

    def test_the_config_is_kept(self, save: Save) -> None:
        _, config = read_state(save())
        assert config == json.loads(json.dumps(dump_config(tiny_config())))


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
        with safe_open(save() / "rank_00000_weights.safetensors", framework="pt") as file:
            stored = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        parameters = dict(backend.model.named_parameters())
        assert stored.keys() == parameters.keys()
        for name, tensor in stored.items():
            assert tensor.dtype == torch.float32
            assert torch.equal(tensor, parameters[name])

    def test_the_tied_weight_is_stored_once(self, save: Save) -> None:
        folder = save()
        assert "lm_head.weight" not in read_manifest(folder)["parameters"]
        stored_bytes = (folder / "rank_00000_weights.safetensors").stat().st_size
        parameters = sum(p.numel() for p in build_model(tiny_model_config(), 1).parameters())
        assert parameters * 4 < stored_bytes < parameters * 4 + 4096

    def test_leftovers_of_crashed_saves_are_removed(self, save: Save, tmp_path: Path) -> None:
        leftover = tmp_path / "checkpoints" / ".step_00000002.partial"
        leftover.mkdir(parents=True)
        (leftover / "rank_00000_weights.safetensors").write_bytes(b"half")
        assert newest_good_checkpoint(tmp_path) is None
        folder = save()
        assert list((tmp_path / "checkpoints").iterdir()) == [folder]

    def test_a_step_can_be_saved_again(self, save: Save, backend: DdpBackend, world: World) -> None:
        save()
        train_steps(backend, 1)
        other = make_backend(world, seed=2)
        load_training_state(save(), other)
        assert_same(contents(other), contents(backend))


class TestDamage:
    @staticmethod
    def truncate(path: Path) -> None:
        path.write_bytes(path.read_bytes()[:-1])

    @staticmethod
    def empty(path: Path) -> None:
        path.write_bytes(b"")

    @staticmethod
    def append(path: Path) -> None:
        path.write_bytes(path.read_bytes() + b"}")

    @staticmethod
    def flip_a_bit(path: Path) -> None:
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 0x10
        path.write_bytes(content)

    @staticmethod
    def delete(path: Path) -> None:
        path.unlink()

    @pytest.mark.parametrize("harm", ["truncate", "empty", "append", "flip_a_bit", "delete"])
    @pytest.mark.parametrize("file", FILES)
    def test_damage_is_found_and_the_older_one_is_used(
        self, save: Save, tmp_path: Path, file: str, harm: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        older, newer = save(2), save(3)
        assert find_damage(newer) is None
        assert newest_good_checkpoint(tmp_path) == newer
        if file == "manifest.json" and harm == "truncate":
            (newer / file).write_text((newer / file).read_text().rstrip())  # the last byte means nothing
        getattr(self, harm)(newer / file)
        problem = find_damage(newer)
        assert problem is not None and file in problem and "\n" not in problem
        with caplog.at_level(logging.WARNING):
            assert newest_good_checkpoint(tmp_path) == older
        assert str(newer) in caplog.text
        assert locate_checkpoint(tmp_path) == older
        with pytest.raises(CheckpointError):
            locate_checkpoint(newer)

    def test_no_bit_of_a_manifest_can_change_unnoticed(self, save: Save) -> None:
        path = save() / "manifest.json"
        content = path.read_bytes()
        for at in range(0, len(content) - 1, 7):
            path.write_bytes(content[:at] + bytes([content[at] ^ (1 << at % 8)]) + content[at + 1 :])
            assert find_damage(path.parent) is not None, content[at - 10 : at + 10]
        path.write_bytes(content)
        assert find_damage(path.parent) is None

    def test_all_damaged_is_none_at_all(self, save: Save, tmp_path: Path) -> None:
        (save() / "state.json").unlink()
        assert newest_good_checkpoint(tmp_path) is None
        with pytest.raises(CheckpointError, match="no checkpoint here"):
            locate_checkpoint(tmp_path)

    def test_another_format_version_is_refused(self, save: Save) -> None:
        folder = save()
        edit_manifest(folder, lambda manifest: manifest.update(format_version=2))
        assert "format version 2, this program reads 1" in str(find_damage(folder))

    @pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/passwd", "sub/file"])
    def test_a_path_that_leaves_the_folder_is_refused(self, save: Save, name: str) -> None:
        folder = save()
        outside = folder.parent / "outside.safetensors"
        outside.write_bytes((folder / "rank_00000_weights.safetensors").read_bytes())

        def point_outside(manifest: dict[str, Any]) -> None:
            manifest["files"][name] = manifest["files"].pop("rank_00000_weights.safetensors")

        edit_manifest(folder, point_outside)
        assert repr(name) in str(find_damage(folder))

    @pytest.mark.parametrize("key", ["files", "parameters"])
    @pytest.mark.parametrize("value", [None, [1], "x", {"a": 3}])
    def test_a_malformed_manifest_is_one_line(self, save: Save, key: str, value: Any) -> None:
        folder = save()
        edit_manifest(folder, lambda manifest: manifest.update({key: value}))
        with pytest.raises(CheckpointError, match=r"manifest\.json: malformed"):
            read_manifest(folder)

    def test_a_malformed_state_is_one_line(self, save: Save) -> None:
        folder = save()
        (folder / "state.json").write_text('{"step": 3}')
        with pytest.raises(CheckpointError, match=r"state\.json: malformed"):
            read_state(folder)


class TestForeign:
    @pytest.mark.parametrize(
        ("change", "named"),
        [({"n_embd": 24}, "wte.weight"), ({"n_layer": 3}, "h.2.ln_1.weight"), ({"n_layer": 1}, "h.1.ln_1.weight")],
    )
    def test_another_models_checkpoint_is_refused(
        self, save: Save, world: World, change: dict[str, int], named: str
    ) -> None:
        folder = save()
        other = make_backend(world, seed=1, model=change)
        before = contents(other)
        with pytest.raises(CheckpointError, match=f"belongs to another model: {named}"):
            load_training_state(folder, other)
        with pytest.raises(CheckpointError, match="belongs to another model"):
            load_weights(folder, {name: p.detach() for name, p in other.model.named_parameters()})
        assert_same(contents(other), before)

    def test_elements_that_no_file_holds_are_an_error(self, save: Save, world: World) -> None:
        folder = save()
        edit_manifest(folder, lambda manifest: manifest["files"].pop("rank_00000_moments.safetensors"))
        with pytest.raises(CheckpointError, match="elements of .* are missing"):
            load_training_state(folder, make_backend(world, seed=2))


class TestRetention:
    def steps(self, run_folder: Path) -> list[int]:
        return [read_state(folder)[0].step for folder in list_checkpoints(run_folder)]

    @pytest.mark.parametrize("keep_last", [1, 2, 3])
    def test_the_last_ones_are_kept(self, save: Save, tmp_path: Path, keep_last: int) -> None:
        for step in (5, 9, 10, 11, 100):
            save(step, keep_last)
        assert self.steps(tmp_path) == [5, 9, 10, 11, 100][-keep_last:]

    def test_a_run_that_went_back_keeps_what_it_writes(self, save: Save, tmp_path: Path) -> None:
        for step in (5, 10, 15, 6, 7):
            save(step, keep_last=3)
        assert self.steps(tmp_path) == [5, 6, 7, 10, 15]
        save(8, keep_last=1)
        assert self.steps(tmp_path) == [8, 10, 15]

    def test_nothing_is_deleted_until_the_newer_one_verifies(
        self, save: Save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        save(1)
        monkeypatch.setattr(saving, "find_damage", lambda folder: f"{folder}: rotten")
        save(2, keep_last=1)
        assert self.steps(tmp_path) == [1, 2]
        assert "does not verify" in caplog.text


@contextmanager
def largest_file(size_bytes: int) -> Iterator[None]:
    """No file may grow beyond this, as on a disk that is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


class TestFailingWrites:
    @pytest.mark.parametrize("size_bytes", [20_000, 100])  # fails in the weights, and in all files
    def test_a_full_disk_leaves_the_old_checkpoint_alone(self, save: Save, tmp_path: Path, size_bytes: int) -> None:
        older = save(1)
        with largest_file(size_bytes), pytest.raises(CheckpointError, match=r"cannot save .*step_00000002: rank 0: .*"):
            save(2, keep_last=1)
        assert list((tmp_path / "checkpoints").iterdir()) == [older]
        assert find_damage(older) is None
        assert newest_good_checkpoint(tmp_path) == older
        assert save(2, keep_last=1).name == "step_00000002"

    def test_a_full_disk_for_the_last_file(self, save: Save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        older = save(1)

        def no_space(*_: object) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(saving, "write_json_durably", no_space)
        with pytest.raises(CheckpointError, match=r"step_00000002: rank 0: No space left on device$"):
            save(2, keep_last=1)
        assert list((tmp_path / "checkpoints").iterdir()) == [older]

    def test_a_place_that_cannot_be_written_to(self, save: Save, tmp_path: Path) -> None:
        (tmp_path / "checkpoints").write_text("a file where a folder should be")
        with pytest.raises(CheckpointError, match="cannot save"):
            save(1)


def cut_into_runs(fragments: list[Fragment], run: int) -> list[Fragment]:
    """The same state in runs of a few elements, which know nothing of rows."""
    return [
        saving._cut(fragment, low, min(low + run, fragment.weight.numel()))
        for fragment in fragments
        for low in range(0, fragment.weight.numel(), run)
    ]


class ShardedBackend(Backend):
    """Every second run of another backend's elements: what one of two ranks has under ZeRO."""

    compute = accumulate = step = dtypes = describe = None  # type: ignore[assignment]

    def __init__(self, whole: DdpBackend, run: int, rank: int) -> None:
        super().__init__(whole.model, whole.loss_scaler)
        self.whole, self.mine = whole, cut_into_runs(whole.fragments(), run)[rank::2]

    def fragments(self) -> list[Fragment]:
        return self.mine

    def state_was_loaded(self, updates: int) -> None:
        self.whole.state_was_loaded(updates)


class TestPieces:
    """What sharded ranks wrote loads into a whole model, and the other way round."""

    @staticmethod
    def rewrite(folder: Path, backend: Backend, fragments_of_rank: list[list[Fragment]]) -> None:
        """The same checkpoint as several ranks would have written it."""
        for kind in ("weights", "moments"):
            (folder / f"rank_00000_{kind}.safetensors").unlink()
        shapes = {name: list(shape) for name, shape in backend.parameter_shapes.items()}
        files: dict[str, Any] = {}
        for rank, fragments in enumerate(fragments_of_rank):
            files |= saving._write_pieces(folder, fragments, shapes, rank)
        edit_manifest(
            folder, lambda manifest: manifest.update(files={"state.json": manifest["files"]["state.json"], **files})
        )
        assert find_damage(folder) is None

    @pytest.mark.parametrize("run", [1000, 64, 33])
    def test_pieces_make_the_whole(self, save: Save, backend: DdpBackend, world: World, run: int) -> None:
        folder = save()
        pieces = cut_into_runs(backend.fragments(), run)
        self.rewrite(folder, backend, [pieces[0::2], pieces[1::2]])
        other = make_backend(world, seed=2)
        load_training_state(folder, other)
        assert_same(contents(other), contents(backend))
        model = build_model(tiny_model_config(), 9)
        load_weights(folder, {name: parameter.detach() for name, parameter in model.named_parameters()})
        assert torch.equal(model.wpe.weight, backend.model.wpe.weight)

    @pytest.mark.parametrize(("stored_run", "loaded_run"), [(None, 50), (64, 50), (50, 64), (33, 1000)])
    def test_pieces_of_one_cut_load_into_another(
        self, save: Save, backend: DdpBackend, world: World, stored_run: int | None, loaded_run: int
    ) -> None:
        folder = save()
        if stored_run:
            pieces = cut_into_runs(backend.fragments(), stored_run)
            self.rewrite(folder, backend, [pieces[0::2], pieces[1::2]])
        other = make_backend(world, seed=2)
        first_half = ShardedBackend(other, loaded_run, rank=0)
        load_training_state(folder, first_half)
        assert any(
            not torch.equal(a, b) for a, b in zip(contents(other).values(), contents(backend).values(), strict=True)
        )
        load_training_state(folder, ShardedBackend(other, loaded_run, rank=1))
        assert_same(contents(other), contents(backend))
        assert other.updates == 3

    @pytest.mark.parametrize("ranks", [2, 3, 50])
    def test_ranks_that_all_hold_everything_share_the_writing(
        self, save: Save, backend: DdpBackend, world: World, ranks: int
    ) -> None:
        folder = save()
        shares = [saving._own_share(backend, replace(world, rank=rank, size=ranks)) for rank in range(ranks)]
        sizes = [sum(fragment.weight.numel() for fragment in share) for share in shares]
        assert max(sizes) - min(sizes) <= 1
        self.rewrite(folder, backend, shares)
        other = make_backend(world, seed=2)
        load_training_state(folder, other)
        assert_same(contents(other), contents(backend))

    def test_a_missing_piece_is_an_error(self, save: Save, backend: DdpBackend, world: World) -> None:
        folder = save()
        pieces = cut_into_runs(backend.fragments(), 64)
        self.rewrite(folder, backend, [pieces[0::2], pieces[1:-2:2]])
        with pytest.raises(CheckpointError, match="elements of .* are missing"):
            load_training_state(folder, make_backend(world, seed=2))


def test_versions_are_of_what_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run under DDP saves without DeepSpeed on the machine."""
    real = saving.version

    def without_deepspeed(package: str) -> str:
        if package == "deepspeed":
            raise PackageNotFoundError(package)
        return real(package)

    monkeypatch.setattr(saving, "version", without_deepspeed)
    assert saving._versions()["torch"] == real("torch")
    assert "deepspeed" not in saving._versions()
