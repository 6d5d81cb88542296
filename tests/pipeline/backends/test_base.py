"""In every backend, a step whose loss or gradient is not finite changes nothing. Worlds of one rank only."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from pipeline.backends import Backend
from pipeline.backends.ddp import DdpBackend
from pipeline.distributed.world import World
from pipeline.model.gpt2 import allocate_model
from tests.pipeline.backends.conftest import count_graphs, make_backend, tensors_of
from tests.pipeline.conftest import assert_same, random_tokens, tiny_config
from tests.support.host_reads import HostReads

BACKENDS = ["ddp", "fsdp", "zero0", "zero1", "zero2", "zero3"]


def adam_steps(backend: Backend) -> set[float]:
    """Return AdamW's step counts."""
    return {float(state["step"]) for state in backend.state.adam_states()}


def train_step(backend: Backend, seed: int, loss_weights: tuple[float, ...] = (1 / 32, 1 / 32)) -> float:
    """Train a step of one micro-batch per loss weight, and return its gradient norm."""
    for i, loss_weight in enumerate(loss_weights):
        tokens = random_tokens(2, 9, seed=10 * seed + i)
        is_last = i == len(loss_weights) - 1
        backend.accumulate(tokens[:, :-1], tokens[:, 1:], loss_weight, is_last=is_last)
    return float(backend.step(1e-2))


def bad_weight(*loss_weights: float) -> Callable[[Backend], float]:
    return lambda backend: train_step(backend, 77, loss_weights)


def poisoned(value: float) -> Callable[[Backend], float]:
    """Return a step with a weight that is not finite and is restored afterwards."""

    def step(backend: Backend) -> float:
        elements = next(f.weight for f in backend.fragments() if f.name == "wpe.weight")
        kept = elements[0].item()
        elements[0] = value
        norm = train_step(backend, 77)
        elements[0] = kept
        return norm

    return step


BAD_STEPS: dict[str, Callable[[Backend], float]] = {
    "NaN": bad_weight(math.nan),
    "infinite": bad_weight(math.inf),
    "one of two": bad_weight(math.nan, 1 / 32),
    "the other of two": bad_weight(1 / 32, -math.inf),
}


@pytest.mark.parametrize(
    ("name", "bad"),
    [(name, bad) for name in BACKENDS for bad in BAD_STEPS if name in ("ddp", "fsdp") or bad == "one of two"],
)
def test_a_bad_step_leaves_no_trace(world: World, name: str, bad: str) -> None:
    steady, disturbed = (make_backend(name, world) for _ in range(2))
    for seed in range(2):
        before, steps = tensors_of(disturbed), adam_steps(disturbed)
        assert not math.isfinite(BAD_STEPS[bad](disturbed))
        assert_same(tensors_of(disturbed), before)
        assert adam_steps(disturbed) == steps
        norms = [train_step(backend, seed) for backend in (steady, disturbed)]
        assert norms[0] == norms[1] > 0
        assert_same(tensors_of(disturbed), tensors_of(steady))
    assert adam_steps(disturbed) == adam_steps(steady) == {2.0}


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["ddp", "fsdp"])
def test_a_step_with_a_loss_that_is_not_finite_leaves_no_trace(world: World, name: str, value: float) -> None:
    steady, disturbed = (make_backend(name, world) for _ in range(2))
    for backend in (steady, disturbed):
        train_step(backend, 0)
    assert not math.isfinite(poisoned(value)(disturbed))
    assert_same(tensors_of(disturbed), tensors_of(steady))
    for backend in (steady, disturbed):
        train_step(backend, 1)
    assert_same(tensors_of(disturbed), tensors_of(steady))
    assert adam_steps(disturbed) == {2.0}


@pytest.mark.parametrize("precision", ["amp_bf16", "amp_fp16", "bf16"])
@pytest.mark.parametrize("name", ["ddp", "fsdp"])
def test_in_every_precision(world: World, name: str, precision: str) -> None:
    """The loss scale is halved if there is one, and nothing else changes."""
    backend = make_backend(name, world, run={"precision": precision})
    train_step(backend, 0)
    before, scale = tensors_of(backend), backend.loss_scaler.scale
    for _ in range(2):
        assert not math.isfinite(train_step(backend, 1, (math.nan,)))
    assert_same(tensors_of(backend), before)
    assert adam_steps(backend) == {1.0}
    assert backend.loss_scaler.scale == (scale / 4 if precision == "amp_fp16" else 1.0)
    assert math.isfinite(train_step(backend, 2))
    assert adam_steps(backend) == {2.0}


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_makes_every_gradient_so(loss: float) -> None:
    """Otherwise a rank without scored targets, or a loss that overflowed, would go unnoticed."""
    weight = torch.ones(3, requires_grad=True)
    (weight.sum() * 0.0 + torch.tensor(loss)).backward()
    assert (weight.grad == 0.0).all(), "a plain backward pass hides it"
    weight.grad = None
    Backend.weighted(weight.sum() + torch.tensor(loss), 0.5).backward()
    assert weight.grad is not None and weight.grad.isnan().all()


def test_a_finite_loss_is_weighted_exactly() -> None:
    weight = torch.tensor([0.1, 3.0], requires_grad=True)
    Backend.weighted((weight * weight).sum(), 1 / 3).backward()
    plain = torch.tensor([0.1, 3.0], requires_grad=True)
    ((plain * plain).sum() * (1 / 3)).backward()
    assert weight.grad is not None and plain.grad is not None and torch.equal(weight.grad, plain.grad)


@pytest.mark.parametrize(
    ("name", "precision"),
    [("ddp", "bf16"), ("fsdp", "bf16"), ("zero1", "fp32"), ("zero3", "fp32")],
)
def test_recomputation_and_compilation_do_not_change_a_step(
    world: World, name: str, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    count_graphs(monkeypatch)  # traces and splits graphs, but runs their operators eagerly
    plain = make_backend(name, world, run={"precision": precision})
    recomputing = make_backend(
        name, world, run={"precision": precision, "compile": True}, model={"activation_checkpointing": True}
    )
    tolerance = 1e-6 if precision == "fp32" else 1e-2
    for seed in range(2):
        norms = [train_step(backend, seed) for backend in (plain, recomputing)]
        assert norms[1] == pytest.approx(norms[0], rel=tolerance)


@pytest.mark.parametrize("name", BACKENDS)
def test_no_micro_step_waits_for_the_device(name: str, world: World) -> None:
    """The second step is counted, because libraries prepare their buffers in the first one."""
    backend = make_backend(name, world, run={"precision": "amp_bf16"})
    train_step(backend, 0)
    tokens = random_tokens(2, 9)
    with HostReads() as reads:
        for is_last in (False, True):
            backend.accumulate(tokens[:, :-1], tokens[:, 1:], 1 / 32, is_last=is_last)
    assert reads.found == []


@pytest.mark.parametrize(("ranks", "ratio", "is_active"), [(1, 1.2, False), (2, 1.2, True), (2, None, False)])
def test_the_step_times_are_measured_only_to_compare_ranks(ranks: int, ratio: float | None, is_active: bool) -> None:
    config = tiny_config(logging={"slow_rank_ratio": ratio})
    backend = object.__new__(DdpBackend)  # the rest of the constructor needs the other rank
    Backend.__init__(backend, allocate_model(config.model, "meta"), config, World(0, ranks, 0, torch.device("cpu")))
    assert backend.step_clock.is_active == is_active
