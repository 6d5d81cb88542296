"""DDP: no wrapper for one process, one reduction per step, and gradients that stay in their buckets."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from pipeline.backends.ddp import DdpBackend
from pipeline.distributed.world import World
from pipeline.model.gpt2 import build_model
from tests.pipeline.backends.conftest import (
    GPU_MODEL,
    backend_config,
    first_of_two,
    is_compiled,
    losses_and_norms,
    micro_batch,
)

ALONE = World(0, 1, 0, torch.device("cpu"))


def make_ddp(world: World, **sections: Any) -> DdpBackend:
    config = backend_config("ddp", **sections)
    return DdpBackend(build_model(config.model, 1), config, world)


@pytest.fixture
def reduced() -> list[int]:
    """Return the list of buckets that ``ddp`` reduces, in order."""
    return []


@pytest.fixture
def ddp(reduced: list[int]) -> Iterator[DdpBackend]:
    """Yield a backend on rank 0 of two; the other rank's gradients are zero."""

    def reduce(bucket: Any) -> torch.futures.Future[Tensor]:
        reduced.append(bucket.index())
        done: torch.futures.Future[Tensor] = torch.futures.Future()
        done.set_result(bucket.buffer().div_(2))
        return done

    with first_of_two() as world:
        backend = make_ddp(world)
        assert isinstance(backend.compute, DistributedDataParallel)
        backend.compute.register_comm_hook(None, lambda _, bucket: reduce(bucket))
        yield backend


def gradients(backend: DdpBackend) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in backend.parameters.items() if p.grad is not None}


def test_wrapping_gives_no_warning() -> None:
    """Torch deprecates options of DDP, such as ``broadcast_buffers``, with a warning on every rank."""
    with first_of_two() as world, warnings.catch_warnings():
        warnings.simplefilter("error")
        assert isinstance(make_ddp(world).compute, DistributedDataParallel)


def test_one_process_needs_no_process_group_and_has_no_wrapper() -> None:
    backend = make_ddp(ALONE)
    assert not isinstance(backend.compute, DistributedDataParallel)
    backend.accumulate(*micro_batch(), 1 / 16, is_last=True)
    backend.step(1e-3)
    assert gradients(backend) == {}


def test_every_bucket_is_reduced_once_per_step(ddp: DdpBackend, reduced: list[int]) -> None:
    for seed in range(2):
        ddp.accumulate(*micro_batch(seed), 1 / 48, is_last=False)
    assert reduced == []
    ddp.accumulate(*micro_batch(2), 1 / 48, is_last=True)
    assert reduced
    assert sorted(reduced) == list(range(len(reduced)))


def test_micro_steps_add_up(ddp: DdpBackend) -> None:
    """The gradient is the mean over the ranks of their sums over micro-steps."""
    alone = make_ddp(ALONE)
    for backend in (ddp, alone):
        for seed in range(3):
            backend.accumulate(*micro_batch(seed), 1 / 48, is_last=seed == 2)
    expected = gradients(alone)
    for name, gradient in gradients(ddp).items():
        torch.testing.assert_close(gradient, expected[name] / 2, rtol=1e-5, atol=1e-7)


def test_gradients_stay_in_their_buckets(ddp: DdpBackend) -> None:
    """With micro-steps, released gradients would be allocated again beside the buckets."""
    addresses = []
    for seed in range(3):
        ddp.accumulate(*micro_batch(seed), 1 / 32, is_last=False)
        ddp.accumulate(*micro_batch(seed), 1 / 32, is_last=True)
        ddp.step(1e-3)
        assert all(gradient.count_nonzero() == 0 for gradient in gradients(ddp).values())
        addresses.append([p.grad.data_ptr() for p in ddp.parameters.values() if p.grad is not None])
    # After the first step DDP rebuilds its buckets in the order in which gradients became ready.
    assert len(addresses[1]) == len(ddp.parameters)
    assert addresses[1] == addresses[2]


@pytest.mark.parametrize("precision", ["fp32", "amp_bf16", "bf16"])
def test_masters_gradients_and_moments_are_fp32(precision: str) -> None:
    dtypes = make_ddp(ALONE, run={"precision": precision}).dtypes()
    assert dtypes.pop("compute weights") == (torch.bfloat16 if precision == "bf16" else torch.float32)
    assert set(dtypes.values()) == {torch.float32}


def test_the_wrapper_is_compiled_as_a_whole() -> None:
    with first_of_two() as world:
        backend = make_ddp(world, run={"compile": True})
        assert is_compiled(backend.compute)
        assert not any(is_compiled(module) for module in backend.model.modules())
    assert not is_compiled(make_ddp(ALONE).compute)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("precision", "compiled", "tolerance"),
    [("fp32", False, 1e-5), ("fp32", True, 1e-5), ("amp_fp16", False, 1e-2), ("bf16", True, 1e-2)],
)
def test_steps_on_a_gpu_are_those_of_a_cpu(gpu: torch.device, precision: str, compiled: bool, tolerance: float) -> None:
    """One process compiles the whole model."""
    run = {"precision": precision, "compile": compiled}
    found = losses_and_norms(make_ddp(World(0, 1, 0, gpu), run={**run, "device": gpu.type}, model=GPU_MODEL))
    expected = losses_and_norms(make_ddp(ALONE, run={"precision": "fp32"}, model=GPU_MODEL))
    assert found == pytest.approx(expected, rel=tolerance)
