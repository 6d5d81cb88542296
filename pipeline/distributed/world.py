"""Define the ranks of a run and the collectives between them."""

from __future__ import annotations

import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore, PrefixStore, Store

from data_tools.errors import DataError, UserError
from data_tools.limits import MemoryKills
from pipeline.config.schema import RunConfig
from pipeline.distributed.environment import (
    check_launcher,
    launched_local_rank,
    launched_rank,
    launched_world_size,
    let_gloo_connect_late,
    set_allocator_default,
    set_launcher_variables,
    visible_gpus,
)
from pipeline.distributed.network_interface import choose_gloo_interface
from pipeline.distributed.progress import Progress
from pipeline.distributed.rendezvous import connecting, open_store
from pipeline.errors import ConfigError, MainRankError

Result = TypeVar("Result")

COLLECTIVE_TIMEOUT = timedelta(minutes=30)
#: With more ranks, Gloo does not connect all pairs of ranks, because each rank could need thousands of sockets.
_RANKS_THAT_ALL_CONNECT = 64


@dataclass
class Ending:
    """What this rank knows about the end of the run. Its main thread and the thread of ``Heartbeat`` share it."""

    has_failed: bool = False  # whether the main thread has raised an error
    verdict: str | None = None  # why another rank ends the run
    memory_kills: MemoryKills = field(default_factory=MemoryKills)


@dataclass(frozen=True)
class World:
    """One rank of a run, with its device and its collectives with the other ranks."""

    rank: int
    size: int
    local_rank: int
    device: torch.device
    store: Store | None = None  # shared by all ranks; None if there is only one rank
    group: dist.ProcessGroup | None = None  # of the collectives; None means torch's default group
    progress: Progress = field(default_factory=Progress)  # the position of the main thread
    ending: Ending = field(default_factory=Ending)

    @classmethod
    def alone(cls, device: torch.device) -> World:
        """Return the world of a single rank, without a process group."""
        return cls(0, 1, 0, device)

    @property
    def is_main(self) -> bool:
        """Return whether this is rank 0, which writes logs and metadata."""
        return self.rank == 0

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Return the elementwise sum over all ranks, as a new tensor. Every rank must call this."""
        self.progress.pass_mark()
        total = values.clone()
        if self.size > 1:
            dist.all_reduce(total, group=self.group)
        return total

    def max(self, value: int) -> int:
        """Return the largest value of all ranks. Every rank must call this."""
        self.progress.pass_mark()
        if self.size == 1:
            return value
        largest = torch.tensor(value, device=self.device)
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=self.group)
        return int(largest.item())

    def barrier(self) -> None:
        """Wait until every rank has made this call."""
        self.progress.pass_mark()
        if self.size > 1:
            dist.barrier(group=self.group)

    def gather(self, item: Any) -> list[Any]:
        """Return the (small) items of all ranks, in the order of the ranks. Every rank must call this."""
        self.progress.pass_mark()
        items = [item] * self.size
        if self.size > 1:
            dist.all_gather_object(items, item, group=self.group)
        return items

    def broadcast(self, item: Any) -> Any:
        """Return the (small) item of rank 0 on every rank. Every rank must call this."""
        self.progress.pass_mark()
        items = [item]
        if self.size > 1:
            dist.broadcast_object_list(items, group=self.group)
        return items[0]

    def call_on_main(self, function: Callable[[], Result]) -> Result:
        """Call a function on rank 0 only, and return its (small) result on every rank. Every rank must call this.

        If the function raises a ``UserError``, rank 0 raises it, and every other rank raises ``MainRankError``.
        """
        result: Result | None = None
        failure: UserError | None = None
        if self.is_main:
            try:
                result = function()
            except UserError as error:
                failure = error
        status = failure.exit_status if failure else None
        result, message, status = self.broadcast((result, str(failure), status))
        if failure:
            failure.is_known_to_all = True
            raise failure
        if status is not None:
            raise MainRankError(message, status)
        return cast(Result, result)

    def call_on_each(self, function: Callable[[], Result]) -> Result:
        """Call a function on every rank, and return this rank's result. Every rank must call this.

        If the function raises a ``UserError`` on any rank, rank 0 raises the error of the first such rank, and every
        other rank raises ``MainRankError``.
        """
        result: Result | None = None
        failure: UserError | None = None
        try:
            result = function()
        except UserError as error:
            failure = error
        problems = self.gather(self.describe_failure(failure) if failure else None)

        def raise_first() -> None:
            if failure and problems[0]:
                raise failure
            if others := [problem for problem in problems if problem]:
                raise DataError(others[0])

        self.call_on_main(raise_first)
        return cast(Result, result)

    def describe_failure(self, error: UserError) -> str:
        """Return the message of an error of this rank. If this is not rank 0, the message names the rank and host."""
        return f"rank {self.rank} on {socket.gethostname()}: {error}" if self.rank else str(error)

    def connect_to_store(self, prefix: str) -> Store:
        """Return a new connection to the key-value store of the ranks. The connection adds a prefix to each key.

        Each thread needs its own connection, because a waiting request blocks later requests on the same connection.
        """
        store = self.store.clone() if self.store else HashStore()  # type: ignore[attr-defined]
        return PrefixStore(prefix, store)

    def with_cpu_group(self) -> World:
        """Return a new ``World`` with its own Gloo process group, for collectives on CPU tensors in another thread.

        Its collectives pass no marks in the progress of this ``World``: only the main thread passes marks, and the
        ranks would otherwise pass them in different orders. Every rank must call this.
        """
        group = dist.new_group(backend="gloo", timeout=COLLECTIVE_TIMEOUT) if self.size > 1 else None
        return replace(self, device=torch.device("cpu"), group=group, progress=Progress())


@contextmanager
def join_world(run: RunConfig, *, process_group: bool = True, device_option: str = "run.device") -> Iterator[World]:
    """Return a context manager that connects this process with the other ranks. Its block gets the ``World``.

    Args:
        process_group: whether to create torch's process group for a single rank too. FSDP and DeepSpeed need it.
        device_option: the key or option that set ``run.device``, for error messages.

    Raises:
        ConfigError: this machine lacks the device in ``run.device``, the launcher's environment variables are not
            valid, or another process uses the port of the key-value store.
    """
    check_launcher()
    rank, size, local_rank = launched_rank(), launched_world_size(), launched_local_rank()
    device = choose_device(run.device, local_rank, device_option)
    if device.type == "mps" and size > 1:
        raise ConfigError(f"{device_option}: mps runs in a single process; start with plain python, or use cpu")
    if device.type == "cuda":
        set_allocator_default()
        torch.cuda.set_device(device)
    world = World(rank, size, local_rank, device)
    set_launcher_variables(device.type)
    if size > 1 or process_group:
        world = replace(world, store=_start_process_group(world))
    try:
        yield world
    finally:
        # After an error, destroying the group could wait for ranks that are still in a collective.
        could_hang = size > 1 and sys.exc_info()[1] is not None
        if dist.is_initialized() and not could_hang:
            dist.destroy_process_group()


def choose_device(wanted: str, local_rank: int = 0, option: str = "run.device") -> torch.device:
    """Return the device for this rank.

    Args:
        wanted: the value of ``run.device``.
        local_rank: the number of this rank on its node. This is also the number of the rank's GPU.
        option: the key or option that set ``wanted``, for error messages.

    Raises:
        ConfigError: this machine does not have the device, or has fewer GPUs than ranks.
    """
    is_available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    available = [device for device in is_available if is_available[device]]
    if wanted == "auto":
        wanted = available[0]
    if wanted not in available:
        raise ConfigError(f"{option}: this machine has no {wanted}; available: {', '.join(available)}, or auto")
    if wanted != "cuda":
        return torch.device(wanted)
    if local_rank >= torch.cuda.device_count():
        visible = visible_gpus()
        limit = "" if visible is None else f" with CUDA_VISIBLE_DEVICES={visible}, which must name every rank's GPU"
        raise ConfigError(
            f"local rank {local_rank} has no GPU: this process sees {torch.cuda.device_count()}{limit}; "
            "start at most one process per GPU"
        )
    return torch.device("cuda", local_rank)


def _start_process_group(world: World) -> Store | None:
    backend = "nccl" if world.device.type == "cuda" else "gloo"
    device_id = world.device if world.device.type == "cuda" else None
    store = open_store(world.rank, world.size, COLLECTIVE_TIMEOUT)
    if world.size > _RANKS_THAT_ALL_CONNECT:
        let_gloo_connect_late()
    with connecting(world.rank):
        if world.size > 1:
            choose_gloo_interface(PrefixStore("interface", store), world.rank, world.size)
        dist.init_process_group(
            backend,
            store=PrefixStore("process_group", store),
            rank=world.rank,
            world_size=world.size,
            timeout=COLLECTIVE_TIMEOUT,
            device_id=device_id,
        )
    return store if world.size > 1 else None
