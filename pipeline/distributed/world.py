"""Who this process is among the ranks, and the collectives of the trainer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store

from data_tools.errors import UserError
from pipeline.config.schema import RunConfig
from pipeline.distributed.environment import (
    launched_local_rank,
    launched_rank,
    launched_world_size,
    present_as_launched,
)
from pipeline.distributed.rendezvous import open_store
from pipeline.errors import ConfigError, LostRankError, ToldByMainRank

Decision = TypeVar("Decision")

COLLECTIVE_TIMEOUT = timedelta(minutes=30)


@dataclass(frozen=True)
class World:
    """The ranks of a run and the device of this one."""

    rank: int
    size: int
    local_rank: int
    device: torch.device
    store: Store | None = None  # shared by all ranks; None: a world of one
    group: dist.ProcessGroup | None = None  # that the collectives run in; None: torch's default one

    @property
    def is_main(self) -> bool:
        """Whether this rank writes logs and metadata."""
        return self.rank == 0

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """The elementwise sum over all ranks, on every rank. ``values`` is left as it is."""
        total = values.clone()
        if self.size > 1:
            dist.all_reduce(total, group=self.group)
        return total

    def max(self, value: int) -> int:
        """The largest of all ranks' values, on every rank."""
        if self.size == 1:
            return value
        largest = torch.tensor(value, device=self.device)
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=self.group)
        return int(largest.item())

    def barrier(self) -> None:
        """Wait until every rank has come here."""
        if self.size > 1:
            dist.barrier(group=self.group)

    def gather(self, item: Any) -> list[Any]:
        """One small Python object of each rank, in rank order, on every rank."""
        items = [item] * self.size
        if self.size > 1:
            dist.all_gather_object(items, item, group=self.group)
        return items

    def broadcast(self, item: Any) -> Any:
        """Rank 0's small Python object, on every rank."""
        items = [item]
        if self.size > 1:
            dist.broadcast_object_list(items, group=self.group)
        return items[0]

    def from_main(self, action: Callable[[], Decision]) -> Decision:
        """What ``action`` gives on the main rank, on every rank; it is small.

        Raises:
            UserError: the main rank's own; the others raise ``ToldByMainRank``.
        """
        decision: Decision | None = None
        failure: UserError | None = None
        if self.is_main:
            try:
                decision = action()
            except UserError as error:
                failure = error
        status = failure.exit_status if failure else None
        decision, message, status = self.broadcast((decision, str(failure), status))
        if failure:
            raise failure
        if status is not None:
            raise ToldByMainRank(message, status)
        return cast(Decision, decision)

    def on_host(self) -> World:
        """The same ranks talking through host memory, in a process group of their own. Collective.

        Another thread may use it while this world is in use.
        """
        group = dist.new_group(backend="gloo", timeout=COLLECTIVE_TIMEOUT) if self.size > 1 else None
        return replace(self, device=torch.device("cpu"), group=group)


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
        world = replace(world, store=_start_process_group(world))
    try:
        yield world
    except LostRankError:
        raise  # to take down a group that misses a rank may wait for it
    except BaseException:
        _leave_process_group()
        raise
    else:
        _leave_process_group()


def _leave_process_group() -> None:
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


def _start_process_group(world: World) -> Store | None:
    """torch's default group; returns the store through which the ranks found each other."""
    backend = "nccl" if world.device.type == "cuda" else "gloo"
    device_id = world.device if world.device.type == "cuda" else None
    store = open_store(world.rank, world.size, COLLECTIVE_TIMEOUT)
    dist.init_process_group(
        backend,
        store=PrefixStore("process_group", store),
        rank=world.rank,
        world_size=world.size,
        timeout=COLLECTIVE_TIMEOUT,
        device_id=device_id,
    )
    return store if world.size > 1 else None
