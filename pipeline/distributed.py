"""Who this process is among the ranks, and the collectives of the trainer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore

from pipeline.config import RunConfig
from pipeline.environment import launched_local_rank, launched_rank, launched_world_size, present_as_launched
from pipeline.errors import ConfigError

COLLECTIVE_TIMEOUT = timedelta(minutes=30)


@dataclass(frozen=True)
class World:
    """The ranks of a run and the device of this one."""

    rank: int
    size: int
    local_rank: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this rank writes logs and metadata."""
        return self.rank == 0

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """The elementwise sum over all ranks, on every rank. ``values`` is left as it is."""
        total = values.clone()
        if self.size > 1:
            dist.all_reduce(total)
        return total

    def barrier(self) -> None:
        """Wait until every rank has come here."""
        if self.size > 1:
            dist.barrier()

    def gather(self, item: Any) -> list[Any]:
        """One small Python object of each rank, in rank order, on every rank."""
        items = [item] * self.size
        if self.size > 1:
            dist.all_gather_object(items, item)
        return items

    def broadcast(self, item: Any) -> Any:
        """Rank 0's small Python object, on every rank."""
        items = [item]
        if self.size > 1:
            dist.broadcast_object_list(items)
        return items[0]


@contextmanager
def join_world(run: RunConfig, *, process_group: bool = True) -> Iterator[World]:
    """Join the ranks that the launcher started; plain ``python`` is a world of one.

    Args:
        process_group: also where this process is alone (DDP, FSDP and DeepSpeed want one).

    Raises:
        ConfigError: a device that this machine lacks, or MPS with several processes.
    """
    rank, size, local_rank = launched_rank(), launched_world_size(), launched_local_rank()
    device = _choose_device(run.device, local_rank)
    if device.type == "mps" and size > 1:
        raise ConfigError("run.device: mps runs in a single process; start with plain python, or use cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    world = World(rank, size, local_rank, device)
    present_as_launched(device.type)
    if size > 1 or process_group:
        _start_process_group(world)
    try:
        yield world
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _choose_device(wanted: str, local_rank: int) -> torch.device:
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if wanted == "auto":
        wanted = next(kind for kind, there in available.items() if there)
    if not available[wanted]:
        there = ", ".join(kind for kind, is_there in available.items() if is_there)
        raise ConfigError(f"run.device (--device): this machine has no {wanted}; available: {there}, or auto")
    if wanted != "cuda":
        return torch.device(wanted)
    if local_rank >= torch.cuda.device_count():
        raise ConfigError(
            f"local rank {local_rank} has no GPU: this machine has {torch.cuda.device_count()}; "
            "start at most that many processes per node"
        )
    return torch.device("cuda", local_rank)


def _start_process_group(world: World) -> None:
    backend = "nccl" if world.device.type == "cuda" else "gloo"
    device_id = world.device if world.device.type == "cuda" else None
    if world.size > 1:
        dist.init_process_group(backend, timeout=COLLECTIVE_TIMEOUT, device_id=device_id)
        return
    # A world of one needs no port: the store lives in this process.
    dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1, device_id=device_id)
