"""The norms of layer groups are those of the gradients and weights themselves."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from pipeline.backends.ddp import DdpBackend
from pipeline.distributed.world import World
from pipeline.model.parameter_state import OPTIMIZER_STATE
from pipeline.training.group_norms import GroupNorms, layer_group
from tests.pipeline.conftest import random_tokens, randomised_model, tiny_config

GROUPS = ["embeddings", "h.0.attn", "h.0.mlp", "h.1.attn", "h.1.mlp", "ln_f"]


def test_each_parameter_has_a_group() -> None:
    names = [name for name, _ in randomised_model(tiny_config().model).named_parameters()]
    assert list(dict.fromkeys(map(layer_group, names))) == GROUPS
    assert layer_group("h.0.ln_1.weight") == "h.0.attn" and layer_group("h.1.ln_2.bias") == "h.1.mlp"
    assert layer_group("wpe.weight") == "embeddings"
    assert layer_group("h.0.new_layer.weight") == "h.0.new_layer"


def norms_of(tensors: dict[str, Tensor]) -> dict[str, float]:
    squares = dict.fromkeys(GROUPS, 0.0)
    for name, tensor in tensors.items():
        squares[layer_group(name)] += float(tensor.double().square().sum())
    return {group: math.sqrt(square) for group, square in squares.items()}


@pytest.mark.parametrize("optimizer", OPTIMIZER_STATE)
@pytest.mark.parametrize("grad_clip", [0.0, 0.1])
def test_the_norms_are_those_of_the_tensors(optimizer: str, grad_clip: float, world: World) -> None:
    """Three steps, so that the moments are not zero. Clipping scales the gradients, but not the norms."""
    config = tiny_config(optimizer={"name": optimizer, "grad_clip": grad_clip, "learning_rate": 1e-2})
    backend = DdpBackend(randomised_model(config.model), config, world)
    parameters = dict(backend.model.named_parameters())
    for step in range(3):
        tokens = random_tokens(2, 13, seed=step)
        backend.accumulate(tokens[:, :-1], tokens[:, 1:], 1 / 24, is_last=True)
        gradients = norms_of({name: p.grad.clone() for name, p in parameters.items() if p.grad is not None})
        before = {name: p.detach().clone() for name, p in parameters.items()}
        norms = GroupNorms(backend, config.optimizer, world)
        grad_norm = float(backend.step(1e-2))
        found = norms.measure(grad_norm)
        weights = norms_of({name: p.detach() for name, p in parameters.items()})
        changes = norms_of({name: p.detach() - before[name] for name, p in parameters.items()})
        for group, old in norms_of(before).items():
            assert found[f"layer_grad_norm/{group}"] == pytest.approx(gradients[group], rel=1e-6)
            assert found[f"layer_weight_norm/{group}"] == pytest.approx(weights[group], rel=1e-6)
            assert found[f"layer_update_ratio/{group}"] == pytest.approx(changes[group] / old, rel=1e-6)
        assert math.hypot(*(found[f"layer_grad_norm/{g}"] for g in GROUPS)) == pytest.approx(grad_norm, rel=1e-9)


@pytest.fixture
def backend(world: World) -> Iterator[DdpBackend]:
    config = tiny_config()
    yield DdpBackend(randomised_model(config.model), config, world)


def test_a_skipped_step_has_no_norms(backend: DdpBackend, world: World) -> None:
    norms = GroupNorms(backend, tiny_config().optimizer, world)
    tokens = random_tokens(2, 13)
    backend.accumulate(tokens[:, :-1], tokens[:, 1:], math.nan, is_last=True)
    assert norms.measure(float(backend.step(1e-2))) == {}


def test_a_gradient_of_zero_has_norms_of_zero(backend: DdpBackend, world: World) -> None:
    norms = GroupNorms(backend, tiny_config().optimizer, world)
    tokens = random_tokens(2, 13)
    backend.accumulate(tokens[:, :-1], tokens[:, 1:], 0.0, is_last=True)
    found = norms.measure(float(backend.step(1e-2)))
    assert all(found[f"layer_grad_norm/{group}"] == 0.0 for group in GROUPS)
    assert not torch.tensor(list(found.values())).isnan().any()
