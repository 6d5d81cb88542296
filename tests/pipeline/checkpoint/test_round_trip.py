"""A checkpoint brings back exactly what was saved, into the model that it was saved of and no other.

Here in one process; other backends and world sizes have tests of their own.
"""

from __future__ import annotations

import json
from dataclasses import replace
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from pipeline.backends.ddp import DdpBackend
from pipeline.checkpoint import (
    load_training_state,
    load_weights,
    read_manifest,
    read_state,
    save_checkpoint,
    saving,
)
from pipeline.checkpoint.folder import GuardState
from pipeline.config.loading import dump_config
from pipeline.distributed.world import World
from pipeline.errors import CheckpointError
from pipeline.model.gpt2 import build_model
from tests.pipeline.checkpoint.conftest import (
    FILES,
    WEIGHTS,
    Save,
    assert_same,
    contents,
    make_backend,
    state_of,
    train_steps,
    unchanged,
    updates_of,
)
from tests.pipeline.conftest import tiny_config, tiny_model_config


class TestRoundTrip:
    def test_weights_moments_and_step_come_back(self, save: Save, backend: DdpBackend, world: World) -> None:
        folder = save()
        other = make_backend(world, seed=2)
        assert not torch.equal(other.model.wte.weight, backend.model.wte.weight)
        state = load_training_state(folder, other)
        assert state == state_of(backend, 3)
        assert updates_of(other) == 3
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

    def test_without_a_loss_scale_there_is_none_to_come_back(self, save: Save, world: World) -> None:
        folder = save()
        assert read_state(folder)[0].loss_scale is None
        scaled = make_backend(world, seed=2, run={"precision": "amp_fp16"})
        load_training_state(folder, scaled)
        assert (scaled.loss_scaler.scale, scaled.loss_scaler.good_steps) == (2.0**16, 0)

    def test_what_the_step_guard_remembers_comes_back(self, tmp_path: Path, backend: DdpBackend, world: World) -> None:
        guard = GuardState(2, 1, ((40, 44), (8, 12)), ((5.25, 1.0), (1 / 3, 2e-30)))
        state = replace(state_of(backend, 3), guard=guard, data_sha256="ab" * 32)
        folder = save_checkpoint(tmp_path, state, {}, backend, world, 1)
        assert read_state(folder)[0] == state
        assert load_training_state(folder, make_backend(world, seed=2)) == state

    def test_the_weights_alone(self, save: Save, backend: DdpBackend) -> None:
        folder = save()
        model = build_model(tiny_model_config(), 9)
        load_weights(folder, {name: parameter.detach() for name, parameter in model.named_parameters()})
        for name, parameter in backend.model.named_parameters():
            assert torch.equal(model.get_parameter(name), parameter), name

    def test_the_config_is_kept(self, save: Save) -> None:
        _, config = read_state(save())
        assert config == json.loads(json.dumps(dump_config(tiny_config())))

    def test_a_step_can_be_saved_again(self, save: Save, backend: DdpBackend, world: World) -> None:
        save()
        train_steps(backend, 1)
        other = make_backend(world, seed=2)
        load_training_state(save(), other)
        assert_same(contents(other), contents(backend))


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
        assert "lm_head.weight" not in read_manifest(folder)["parameters"]
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
        assert "deepspeed" not in versions


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
        with unchanged(other):
            with pytest.raises(CheckpointError, match=f"belongs to another model: {named}"):
                load_training_state(folder, other)
            with pytest.raises(CheckpointError, match="belongs to another model"):
                load_weights(folder, {name: p.detach() for name, p in other.model.named_parameters()})
