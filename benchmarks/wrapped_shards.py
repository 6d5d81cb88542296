"""Measure the size of parameters, gradients and moments on rank 0 at any world size, with a fake process group.

FSDP2 wraps a model with the shapes of GPT-2, because it allocates only the shards of this rank. DDP and ZeRO wrap a
small model.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from pipeline.backends import create_backend
from pipeline.config.loading import load_config
from pipeline.config.schema import Config
from pipeline.data.batch_plan import BatchPlan, plan_batch
from pipeline.distributed.environment import set_launcher_variables
from pipeline.distributed.world import World
from pipeline.model.gpt2 import allocate_model
from pipeline.planning.memory import layout_of
from tests.support.runs import CONFIGS

WORLD_SIZES = (8, 64, 1024, 4096)
RANKS_PER_NODE = 8
SMALL_BACKENDS = ("ddp", "zero1", "zero2", "zero3")
SEQ_LEN = 64

REAL_MODEL = ["model.preset=gpt2", "model.n_layer=2"]  # every shape of GPT-2 124M
SMALL_MODEL = ["model.n_layer=2", "model.n_head=3", "model.n_embd=96", "model.vocab_size=1000"]
SMALL_BUCKET = "backend.deepspeed.zero_optimization.reduce_bucket_size=1000000"


@dataclass(frozen=True)
class Shards:
    backend: str
    world_size: int
    state: str  # parameters, gradients or moments
    planned_bytes: int
    wrapped_bytes: int

    @property
    def agrees(self) -> bool:
        """Return whether planned and wrapped bytes are equal. Rank 0 has the largest shard."""
        return self.planned_bytes == self.wrapped_bytes

    def cells(self) -> tuple[str, ...]:
        return (self.backend, f"{self.world_size:,}", self.state, f"{self.planned_bytes:,}", f"{self.wrapped_bytes:,}")


def compare_shards(world_size: int) -> Iterator[Shards]:
    """Compare every backend at one world size."""
    yield from compare_fsdp(world_size)
    if world_size > RANKS_PER_NODE:
        yield from compare_fsdp(world_size, RANKS_PER_NODE)
    for backend in SMALL_BACKENDS:
        yield from compare_small(backend, world_size)


def compare_fsdp(world_size: int, shard_group_size: int | None = None) -> Iterator[Shards]:
    """Wrap the model, run a step, and sum the local bytes."""
    groups = [] if shard_group_size is None else [f"backend.fsdp.shard_group_size={shard_group_size}"]
    name = "fsdp" if shard_group_size is None else f"fsdp/{shard_group_size}"
    config, plan = _planned("fsdp", world_size, [*REAL_MODEL, *groups])
    with _fake_world(world_size) as world:
        backend: Any = create_backend(allocate_model(config.model, "meta"), config, world, plan)
        tokens = torch.zeros(1, SEQ_LEN, dtype=torch.int64)
        backend.compute(tokens, tokens).backward()
        parameters = list(backend.parameters.values())
        gradients = sum(_local_bytes(parameter.grad) for parameter in parameters)
        backend.optimizer.step()
        moments = sum(
            _local_bytes(state[key]) for state in backend.optimizer.state.values() for key in ("exp_avg", "exp_avg_sq")
        )
    layout = layout_of(config, plan)
    yield Shards(name, world_size, "parameters", layout.parameters, sum(map(_local_bytes, parameters)))
    yield Shards(name, world_size, "gradients", layout.parameters, gradients)
    yield Shards(name, world_size, "moments", layout.optimizer, moments)


def compare_small(name: str, world_size: int) -> Iterator[Shards]:
    """Wrap a small model in memory, and sum the bytes of the optimizer's state."""
    config, plan = _planned(name, world_size, [*SMALL_MODEL, *([SMALL_BUCKET] if name.startswith("zero") else [])])
    layout = layout_of(config, plan)
    with _fake_world(world_size) as world:
        backend: Any = create_backend(allocate_model(config.model, "meta"), config, world, plan)
        if name == "ddp":
            sizes = backend.compute._get_ddp_logging_data()["bucket_sizes"]  # one string
            yield Shards(name, world_size, "gradients", layout.gradients(0), sum(map(int, str(sizes).split(","))))
            moments = sum(tensor.nbytes for fragment in backend.fragments() for tensor in fragment.state.values())
        else:
            states = backend.state.adam_states()  # creates the moments if no step has created them
            moments = sum(state["exp_avg"].nbytes + state["exp_avg_sq"].nbytes for state in states)
        yield Shards(name, world_size, "moments", layout.optimizer, moments)
        backend.close()


def _planned(name: str, world_size: int, sets: list[str]) -> tuple[Config, BatchPlan]:
    own = ["run.device=cpu", "run.precision=fp32", f"model.context_length={SEQ_LEN}", "batch.micro_batch_size=1"]
    own.append(f"batch.tokens_per_step={SEQ_LEN * world_size}")
    config = load_config([CONFIGS / f"{name}.json"], [*own, *sets])
    return config, plan_batch(config, world_size)


@contextmanager
def _fake_world(world_size: int) -> Iterator[World]:
    """Join a fake process group as rank 0. Its collectives return at once and do not change the tensors."""
    set_launcher_variables("cpu")
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world_size)
    try:
        yield World(0, world_size, 0, torch.device("cpu"))
    finally:
        if dist.is_initialized():  # DeepSpeed destroys it
            dist.destroy_process_group()


def _local_bytes(tensor: Tensor | None) -> int:
    assert isinstance(tensor, DTensor)
    return tensor.to_local().nbytes  # not the storage, which the gradients of a group share
