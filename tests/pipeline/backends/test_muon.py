"""On every backend, a step of Muon is the step of the formula in fp64, and AdamW updates the other parameters."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.backends import Backend, create_backend
from pipeline.backends.gradient_clipping import CLIP_EPS
from pipeline.config.schema import Config
from pipeline.data.batch_plan import plan_batch
from pipeline.distributed.world import World
from pipeline.model.gpt2 import allocate_model, build_model
from pipeline.model.muon_matrices import belongs_to_muon
from tests.pipeline.backends.conftest import backend_section, make_backend, micro_batch
from tests.pipeline.conftest import tiny_config

LEARNING_RATE = 1e-2
OPTIMIZER: dict[str, Any] = {"name": "muon", "grad_clip": 0.5, "weight_decay": 0.1}
OFFLOADS = {
    "zero2_offload": {"stage": 2, "offload_optimizer": {"device": "cpu"}},
    "zero3_offload": {"stage": 3, "offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}},
}
BACKENDS = ["ddp", "fsdp", "zero0", "zero1", "zero2", "zero3", *OFFLOADS]


def muon_config(name: str, **muon: Any) -> Config:
    backend = (
        {"name": "deepspeed", "deepspeed": {"zero_optimization": OFFLOADS[name]}}
        if name in OFFLOADS
        else backend_section(name)
    )
    return tiny_config(backend=backend, optimizer={**OPTIMIZER, "muon": muon})


def make_muon(name: str, world: World, **muon: Any) -> Backend:
    config = muon_config(name, **muon)
    backend = create_backend(allocate_model(config.model, "meta"), config, world, plan_batch(config, world.size))
    backend.draw_weights(1)
    return backend


def train(backend: Backend, seeds: range) -> None:
    for seed in seeds:
        backend.accumulate(*micro_batch(seed), 1 / 16, is_last=True)
        backend.step(LEARNING_RATE)


def weights_of(backend: Backend) -> dict[str, Tensor]:
    return {fragment.name: fragment.weight.clone() for fragment in backend.fragments()}


def clipped_gradients(seed: int, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the gradients of a micro-batch in fp32, clipped, computed without a backend."""
    model = build_model(tiny_config().model, 1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights[name].view(parameter.shape))
    (model(*micro_batch(seed)) / 16).backward()
    gradients = {name: p.grad.double() for name, p in model.named_parameters() if p.grad is not None}
    norm = torch.stack([gradient.square().sum() for gradient in gradients.values()]).sum().sqrt()
    factor = min(1.0, OPTIMIZER["grad_clip"] / (norm.item() + CLIP_EPS))
    assert factor < 0.9, "clipping is active"
    return {name: gradient * factor for name, gradient in gradients.items()}


def orthogonal(matrix: Tensor, iterations: int) -> Tensor:
    """Return the result of the iterations from the singular value decomposition."""
    u, values, vt = torch.linalg.svd(matrix, full_matrices=False)
    x = values / values.square().sum().sqrt()
    for _ in range(iterations):
        x = 3.4445 * x - 4.7750 * x**3 + 2.0315 * x**5
    return 0.2 * max(matrix.shape) ** 0.5 * (u @ torch.diag(x) @ vt)


def reference_step(
    weight: Tensor, gradient: Tensor, momentum: Tensor, *, splits: int, nesterov: bool = True, iterations: int = 5
) -> Tensor:
    """Return the new weight in fp64, and update the momentum in place."""
    momentum.mul_(0.95).add_(0.05 * gradient)
    direction = 0.05 * gradient + 0.95 * momentum if nesterov else momentum
    update = torch.cat([orthogonal(matrix, iterations) for matrix in direction.chunk(splits)])
    return weight * (1 - LEARNING_RATE * OPTIMIZER["weight_decay"]) - LEARNING_RATE * update


def assert_steps_follow_the_formula(
    backend: Backend, *, split_qkv: bool = True, **settings: Any
) -> list[dict[str, Tensor]]:
    """Train two steps, and compare the change of each matrix with the reference. Return the weights after each step."""
    shapes = backend.parameter_shapes
    momenta = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in shapes.items()}
    trained = []
    for seed in range(2):
        before = weights_of(backend)
        gradients = clipped_gradients(seed, before)
        train(backend, range(seed, seed + 1))
        trained.append(weights_of(backend))
        for name, found in trained[-1].items():
            if not belongs_to_muon(name, shapes[name]):
                continue
            old = before[name].double().view(shapes[name])
            splits = 3 if split_qkv and "c_attn" in name else 1
            new = reference_step(old, gradients[name], momenta[name], splits=splits, **settings)
            difference = (found.double().view(shapes[name]) - new).norm() / (new - old).norm()
            assert difference < 1e-5, (name, seed, difference)
    return trained


@pytest.mark.parametrize("name", BACKENDS)
def test_a_step_is_that_of_the_formula(world: World, name: str) -> None:
    """The other parameters take the step of AdamW, compared after one step, so that the gradients are the same."""
    backend = make_muon(name, world)
    assert " with Muon and " in backend.describe() and "Adam" in backend.describe()
    assert_states_of_the_optimizers(backend, are_zero=True)
    adamw = make_backend("ddp", world, optimizer={**OPTIMIZER, "name": "adamw"})
    train(adamw, range(1))
    expected = weights_of(adamw)
    for parameter, found in assert_steps_follow_the_formula(backend)[0].items():
        is_close = torch.allclose(found, expected[parameter], rtol=0, atol=1e-6)
        assert is_close != belongs_to_muon(parameter, backend.parameter_shapes[parameter]), parameter
    assert_states_of_the_optimizers(backend, are_zero=False)


def assert_states_of_the_optimizers(backend: Backend, *, are_zero: bool) -> None:
    for fragment in backend.fragments():
        assert tuple(fragment.state) == backend.state_names[fragment.name]
        assert all(tensor.any() != are_zero for tensor in fragment.state.values()), fragment.name


@pytest.mark.parametrize(
    "settings",
    [{"nesterov": False}, {"iterations": 3}, {"split_qkv": False}],
    ids=lambda settings: next(iter(settings)),
)
def test_settings(world: World, settings: dict[str, Any]) -> None:
    assert_steps_follow_the_formula(make_muon("ddp", world, **settings), **settings)


def test_micro_batches_are_accumulated_before_the_momentum(world: World) -> None:
    """Two micro-batches of half the weight are one step, not two."""
    backends = [make_muon("ddp", world) for _ in range(2)]
    backends[0].accumulate(*micro_batch(0), 1 / 16, is_last=True)
    for is_last in (False, True):
        backends[1].accumulate(*micro_batch(0), 1 / 32, is_last=is_last)
    for backend in backends:
        backend.step(LEARNING_RATE)
    first, second = (weights_of(backend) for backend in backends)
    for name, weight in first.items():
        torch.testing.assert_close(weight, second[name])


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("amp_bf16", torch.bfloat16)])
def test_the_iterations_have_the_dtype_of_the_matrix_products(
    world: World, precision: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: set[torch.dtype] = set()

    def record(matrices: Tensor, iterations: int) -> Tensor:
        seen.add(matrices.dtype)
        return matrices

    monkeypatch.setattr("pipeline.backends.muon.orthogonalize", record)
    backend = make_backend("ddp", world, run={"precision": precision}, optimizer=OPTIMIZER)
    train(backend, range(1))
    assert seen == {dtype}
    assert all(
        tensor.dtype == torch.float32 for fragment in backend.fragments() for tensor in fragment.tensors.values()
    )
