"""The moving average of the weights in every backend. Worlds of one rank only."""

from __future__ import annotations

import pytest
import torch

from pipeline.backends import Backend
from pipeline.backends.weight_average import WeightAverage
from pipeline.distributed.world import World
from pipeline.model.gpt2 import build_model
from pipeline.model.parameter_state import EMA, WEIGHT
from tests.pipeline.backends.conftest import make_backend, tensors_of
from tests.pipeline.conftest import assert_same, random_tokens

BACKENDS = ["ddp", "fsdp", "zero0", "zero1", "zero2", "zero3"]
DECAYS = [0.1, 0.5, 0.9, 0.97]


def average_and_train(backend: Backend, decay: float, seed: int, loss_weight: float = 1 / 16) -> None:
    tokens = random_tokens(2, 9, seed=seed)
    backend.accumulate(tokens[:, :-1], tokens[:, 1:], loss_weight, is_last=True)
    backend.step(1e-2, decay)


@pytest.mark.parametrize("name", BACKENDS)
def test_the_average_is_that_of_the_formula(name: str, world: World) -> None:
    """Compare with the formula in fp64. The average of the step before the first is the initial weight."""
    backend = make_backend(name, world, averaging={"ema": 0.5}, optimizer={"name": "muon"})
    expected = {
        f"{name} {EMA}": parameter.detach().double().view(-1).clone()
        for name, parameter in build_model(backend.model.config, 1).named_parameters()
    }
    for seed, decay in enumerate(DECAYS):
        average_and_train(backend, decay, seed)
        for key, weight in tensors_of(backend, WEIGHT).items():
            average = expected[f"{key.rpartition(' ')[0]} {EMA}"]
            average.mul_(decay).add_(weight.double(), alpha=1 - decay)
    averages = tensors_of(backend, EMA)
    assert averages.keys() == expected.keys()
    for key, average in averages.items():
        torch.testing.assert_close(average.double(), expected[key], rtol=1e-6, atol=1e-8, msg=key)


@pytest.mark.parametrize("name", BACKENDS)
def test_a_skipped_step_does_not_change_it(name: str, world: World) -> None:
    backend = make_backend(name, world, averaging={"ema": 0.5})
    average_and_train(backend, 0.5, seed=0)
    before = tensors_of(backend)
    average_and_train(backend, 0.5, seed=1, loss_weight=float("inf"))
    assert_same(tensors_of(backend), before)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", BACKENDS)
def test_the_model_computes_with_it_inside_the_block_only(name: str, precision: str, world: World) -> None:
    """A twin never computes with its average. After the block, both train alike, bit for bit."""
    sections = {"averaging": {"ema": 0.9}, "run": {"precision": precision}}
    backend, twin = (make_backend(name, world, **sections) for _ in range(2))
    tokens = random_tokens(2, 8, seed=9)
    for seed in range(3):
        for trained in (backend, twin):
            average_and_train(trained, 0.9, seed)
    with backend.evaluation_mode():
        own = backend(tokens, method="logits")
        with backend.averaged_weights():
            averaged = backend(tokens, method="logits")
        assert torch.equal(backend(tokens, method="logits"), own)

    other = make_backend("ddp", world, run={"precision": precision})
    averages = tensors_of(backend, EMA)
    for fragment in other.fragments():
        fragment.weight.copy_(averages[f"{fragment.name} {EMA}"])
    with other.evaluation_mode():
        expected = other(tokens, method="logits")
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if precision == "fp32" else {"rtol": 0, "atol": 0.02}
    torch.testing.assert_close(averaged.float(), expected.float(), **tolerance)
    assert not torch.equal(averaged, own)

    assert_same(tensors_of(backend), tensors_of(twin))
    for trained in (backend, twin):
        average_and_train(trained, 0.9, seed=5)
    assert_same(tensors_of(backend), tensors_of(twin))


def test_without_an_average_nothing_is_kept(world: World) -> None:
    backend = make_backend("ddp", world)
    assert backend.state.average is None
    assert not tensors_of(backend, EMA)


def test_a_swap_in_pieces_is_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.backends.weight_average._SWAPPED_ELEMENTS", 4)
    masters = [torch.randn(3, 5), torch.randn(1)]
    before = [master.clone() for master in masters]
    average = WeightAverage(masters)
    average.update(0.5, 1.0)
    for master in masters:
        master.neg_()
    average.swap()
    for master, old in zip(masters, before, strict=True):
        assert torch.equal(master, old) and torch.equal(average.of(master), -old)


@pytest.mark.gpu
def test_a_gpu_skips_without_waiting(gpu: torch.device) -> None:
    """The norm decides on the device, with the result of a CPU."""
    masters = [torch.randn(5, 7), torch.randn(3)]
    on_gpu = [master.to(gpu) for master in masters]
    averages = WeightAverage(masters), WeightAverage(on_gpu)
    for average, tensors in zip(averages, (masters, on_gpu), strict=True):
        average.create()
        for master in tensors:
            master.mul_(2)
        for norm in (1.0, float("nan"), float("inf")):
            average.update(0.75, torch.tensor(norm, device=tensors[0].device))
    for master, other in zip(masters, on_gpu, strict=True):
        torch.testing.assert_close(averages[1].of(other).cpu(), averages[0].of(master))
