"""Loading restores exactly what was saved, into the same model only.

These tests run in one process; other backends and world sizes have their own tests.
"""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from pipeline.backends.ddp import DdpBackend
from pipeline.checkpoint.loading import load_model, load_training_state, load_weights
from pipeline.checkpoint.state import GuardState, read_state
from pipeline.checkpoint.verification import find_damage
from pipeline.config.loading import dump_config
from pipeline.distributed.world import World
from pipeline.errors import CheckpointError
from tests.pipeline.checkpoint.conftest import (
    MOMENTS,
    Save,
    contents,
    make_backend,
    state_of,
    stored_tensors,
    train_steps,
    unchanged,
    updates_of,
)
from tests.pipeline.conftest import assert_same, tiny_config
from tests.support.checkpoints import save_checkpoint


class TestRoundTrip:
    def test_weights_moments_and_step_are_restored(self, save: Save, backend: DdpBackend, world: World) -> None:
        folder = save()
        other = make_backend(world, seed=2)
        assert not torch.equal(other.model.wte.weight, backend.model.wte.weight)
        state = load_training_state(folder, other)
        assert state == state_of(backend, 3)
        assert updates_of(other) == 3
        assert_same(contents(other), contents(backend))
        other.model.assert_tied()

    def test_training_continues_as_if_never_stopped(self, save: Save, backend: DdpBackend, world: World) -> None:
        folder = save()
        other = make_backend(world, seed=2)
        load_training_state(folder, other)
        for trained in (backend, other):
            train_steps(trained, 3, first_seed=50)
        assert_same(contents(other), contents(backend))

    @pytest.mark.gpu
    def test_a_checkpoint_goes_from_a_cpu_to_a_gpu_and_back(
        self, save: Save, backend: DdpBackend, tmp_path: Path, world: World, gpu: torch.device
    ) -> None:
        """Weights and moments stay bit for bit, and training continues on the other device."""
        on_gpu = World(0, 1, 0, gpu)
        moved = make_backend(on_gpu, seed=2, run={"device": gpu.type})
        state = load_training_state(save(), moved)
        assert all(t.device.type == gpu.type for fragment in moved.fragments() for t in fragment.tensors.values())
        assert_same(contents(moved), contents(backend))
        train_steps(moved, 1, first_seed=50)
        there = contents(moved)
        returned = make_backend(world, seed=3)
        folder = save_checkpoint(tmp_path / "moved", state_of(moved, 4), dump_config(tiny_config()), moved, on_gpu, 1)
        assert load_training_state(folder, returned).step == state.step + 1
        assert_same(contents(returned), there)
        train_steps(backend, 1, first_seed=50)
        for name, tensor in contents(backend).items():
            torch.testing.assert_close(there[name], tensor, rtol=1e-3, atol=1e-3)

    def test_a_checkpoint_of_an_untrained_model(self, save: Save, world: World) -> None:
        fresh, other = make_backend(world, seed=5), make_backend(world, seed=6)
        load_training_state(save(0, of=fresh), other)
        for trained in (fresh, other):
            train_steps(trained, 2)
        assert_same(contents(other), contents(fresh))

    def test_the_loss_scale_is_restored(self, tmp_path: Path, world: World) -> None:
        scaled = make_backend(world, seed=1, run={"precision": "amp_fp16"})
        scaled.loss_scaler.scale, scaled.loss_scaler.good_steps = 1024.0, 77
        folder = save_checkpoint(tmp_path, state_of(scaled, 1), {}, scaled, world, 1)
        other = make_backend(world, seed=2, run={"precision": "amp_fp16"})
        load_training_state(folder, other)
        assert (other.loss_scaler.scale, other.loss_scaler.good_steps) == (1024.0, 77)
        unscaled = make_backend(world, seed=2)
        load_training_state(folder, unscaled)
        assert unscaled.loss_scaler.scale == 1.0

    def test_without_a_stored_loss_scale_the_default_is_kept(self, save: Save, world: World) -> None:
        folder = save()
        assert read_state(folder)[0].loss_scale is None
        scaled = make_backend(world, seed=2, run={"precision": "amp_fp16"})
        load_training_state(folder, scaled)
        assert (scaled.loss_scaler.scale, scaled.loss_scaler.good_steps) == (2.0**16, 0)

    def test_the_guard_state_is_restored(self, tmp_path: Path, backend: DdpBackend, world: World) -> None:
        guard = GuardState(2, 1, ((40, 44), (8, 12)), ((5.25, 1.0), (1 / 3, 2e-30)))
        state = replace(state_of(backend, 3), guard=guard, data_sha256="ab" * 32)
        folder = save_checkpoint(tmp_path, state, {}, backend, world, 1)
        assert read_state(folder)[0] == state
        assert load_training_state(folder, make_backend(world, seed=2)) == state

    def test_the_weights_alone(self, save: Save, backend: DdpBackend) -> None:
        folder = save()
        (folder / MOMENTS).unlink()
        model = load_model(folder).model
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


class TestOptimizers:
    """The state of any optimizer is stored by name. Another optimizer starts with state of zeros."""

    MUON = {"name": "muon"}
    ADAMW = {"name": "adamw"}

    def trained(self, world: World, optimizer: dict[str, str]) -> DdpBackend:
        backend = make_backend(world, seed=1, optimizer=optimizer)
        train_steps(backend, 3)
        return backend

    def test_muon_continues_as_if_never_stopped(self, save: Save, world: World) -> None:
        trained, other = self.trained(world, self.MUON), make_backend(world, seed=2, optimizer=self.MUON)
        folder = save(of=trained)
        assert find_damage(folder) is None
        assert load_training_state(folder, other) == state_of(trained, 3)
        assert_same(contents(other), contents(trained))
        for backend in (trained, other):
            train_steps(backend, 2, first_seed=50)
        assert_same(contents(other), contents(trained))

    def test_muon_stores_one_tensor_per_matrix(self, save: Save, world: World) -> None:
        trained = self.trained(world, self.MUON)
        stored = stored_tensors(save(of=trained))
        assert stored.keys() == {f"{kind} {name}" for name, kind in map(str.split, contents(trained))}
        assert "momentum h.0.mlp.c_fc.weight" in stored and "exp_avg h.0.mlp.c_fc.weight" not in stored
        assert "exp_avg_sq wte.weight" in stored and "momentum wte.weight" not in stored

    @pytest.mark.parametrize(("before", "after"), [(ADAMW, MUON), (MUON, ADAMW)], ids=["to muon", "to adamw"])
    def test_another_optimizer_starts_from_zero_and_says_so(
        self,
        save: Save,
        world: World,
        before: dict[str, str],
        after: dict[str, str],
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        trained, other = self.trained(world, before), self.trained(world, after)
        fresh = make_backend(world, seed=2, optimizer=after)
        folder = save(of=trained)
        state = load_training_state(folder, other)
        assert "another optimizer has written this checkpoint; the optimizer's state starts from zero" in caplog.text
        assert state == replace(state_of(trained, 3), optimizer_start=3)
        load_weights(folder, {name: p.detach() for name, p in fresh.model.named_parameters()})
        assert_same(contents(other), contents(fresh))
        for backend in (other, fresh):
            train_steps(backend, 2, first_seed=50)
        assert_same(contents(other), contents(fresh))

    def test_the_new_optimizer_continues_from_its_own_start(self, tmp_path: Path, save: Save, world: World) -> None:
        """AdamW counts the updates since the change, also after another resume."""
        changed = make_backend(world, seed=2, optimizer=self.MUON)
        state = load_training_state(save(of=self.trained(world, self.ADAMW)), changed)
        train_steps(changed, 2, first_seed=50)
        state = replace(state, step=5, updates=5)
        folder = save_checkpoint(tmp_path, state, dump_config(tiny_config()), changed, world, 10)
        other = make_backend(world, seed=3, optimizer=self.MUON)
        assert load_training_state(folder, other) == state
        assert updates_of(other) == updates_of(changed) == 2
        for backend in (changed, other):
            train_steps(backend, 2, first_seed=60)
        assert_same(contents(other), contents(changed))


class TestAverage:
    """The moving average of the weights is stored like the optimizer's state, but does not depend on the optimizer."""

    AVERAGE: ClassVar[dict[str, float]] = {"ema": 0.9}

    def trained(self, world: World) -> DdpBackend:
        backend = make_backend(world, seed=1, averaging=self.AVERAGE)
        train_steps(backend, 3, ema_decay=0.9)
        return backend

    def averages(self, backend: DdpBackend) -> dict[str, Tensor]:
        return {name: tensor for name, tensor in contents(backend).items() if name.endswith(" ema")}

    def test_it_continues_as_if_never_stopped(self, save: Save, world: World, caplog: pytest.LogCaptureFixture) -> None:
        trained, other = self.trained(world), make_backend(world, seed=2, averaging=self.AVERAGE)
        folder = save(of=trained)
        assert find_damage(folder) is None
        load_training_state(folder, other)
        assert_same(contents(other), contents(trained))
        for backend in (trained, other):
            train_steps(backend, 2, first_seed=50, ema_decay=0.9)
        assert_same(contents(other), contents(trained))
        assert not caplog.text

    def test_without_a_stored_one_it_starts_as_a_copy_and_says_so(
        self, save: Save, backend: DdpBackend, world: World, caplog: pytest.LogCaptureFixture
    ) -> None:
        other = self.trained(world)
        with caplog.at_level(logging.INFO):
            load_training_state(save(), other)
        assert "has no average of the weights; the average starts as a copy of the weights" in caplog.text
        weights = {f"{name} ema": parameter.view(-1) for name, parameter in backend.model.named_parameters()}
        assert_same(self.averages(other), weights)
        assert_same({k: tensor for k, tensor in contents(other).items() if not k.endswith(" ema")}, contents(backend))

    def test_a_run_without_it_leaves_it_out_and_says_so(
        self, save: Save, world: World, caplog: pytest.LogCaptureFixture
    ) -> None:
        trained, other = self.trained(world), make_backend(world, seed=2)
        with caplog.at_level(logging.INFO):
            load_training_state(save(of=trained), other)
        assert "the average of the weights is not continued, because averaging.ema is null" in caplog.text
        assert not self.averages(other)
        for name, tensor in contents(other).items():
            assert torch.equal(tensor, contents(trained)[name]), name

    def test_another_optimizer_keeps_it(self, save: Save, world: World) -> None:
        trained = self.trained(world)
        other = make_backend(world, seed=2, averaging=self.AVERAGE, optimizer={"name": "muon"})
        assert load_training_state(save(of=trained), other).optimizer_start == 3
        assert_same(self.averages(other), self.averages(trained))

    def test_a_model_is_loaded_with_it(self, save: Save, world: World) -> None:
        trained = self.trained(world)
        folder, averages = save(of=trained), self.averages(trained)
        own, averaged = (load_model(folder, torch.device("cpu"), weights).model for weights in ("training", "ema"))
        for name, parameter in averaged.named_parameters():
            assert torch.equal(parameter.view(-1), averages[f"{name} ema"]), name
            assert torch.equal(own.get_parameter(name), trained.model.get_parameter(name)), name

    def test_a_checkpoint_without_it_is_refused(self, save: Save) -> None:
        with pytest.raises(CheckpointError, match=r"^--weights ema: \S+ has no moving average .* averaging.ema$"):
            load_model(save(), torch.device("cpu"), "ema")


class TestOtherModel:
    @pytest.mark.parametrize(
        ("change", "named"),
        [({"n_embd": 24}, "wte.weight"), ({"n_layer": 3}, "h.2.ln_1.weight"), ({"n_layer": 1}, "h.1.ln_1.weight")],
    )
    def test_it_is_rejected(self, save: Save, world: World, change: dict[str, int], named: str) -> None:
        folder = save()
        other = make_backend(world, seed=1, model=change)
        with unchanged(other):
            with pytest.raises(CheckpointError, match=f"belongs to another model: {named}"):
                load_training_state(folder, other)
            with pytest.raises(CheckpointError, match="belongs to another model"):
                load_weights(folder, {name: p.detach() for name, p in other.model.named_parameters()})
