"""The cores of a host shared among its ranks: how many threads each computes with, and on which cores."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from pipeline.distributed.environment import requested_threads
from pipeline.distributed.host_memory import keep_freed_memory
from pipeline.distributed.world import World


@dataclass(frozen=True)
class Placement:
    """Where a rank computes."""

    threads: int
    bound_to: tuple[int, ...] | None  # cores; None: the operating system chooses

    def __str__(self) -> str:
        cores = "" if self.bound_to is None else f", bound to cores {', '.join(map(str, self.bound_to))}"
        return f"{self.threads} a process{cores}"


def settle_on_host(world: World) -> Placement:
    """The host's memory and cores as large computations want them; to be called before the first. Collective."""
    keep_freed_memory()
    return take_share_of_cores(world)


def take_share_of_cores(world: World) -> Placement:
    """Compute with this rank's share of the host's cores. Collective.

    Ranks that may all use the same cores are bound to a part each: a thread that moves leaves its cache behind, and
    two on one core wait for each other. What somebody has chosen stays: ``OMP_NUM_THREADS``, or cores that a launcher
    has given to each rank.
    """
    if threads := requested_threads():
        torch.set_num_threads(threads)
        return Placement(threads, None)
    cores = _usable_cores()
    offered = _offered_on_this_host(world, cores)
    shared = len(offered) > 1 and all(other == cores for other in offered)
    share = share_of(cores, world.local_rank, len(offered)) if shared else cores
    torch.set_num_threads(len(share))
    bound = shared and len(cores) >= len(offered) and hasattr(os, "sched_setaffinity")
    if bound:
        os.sched_setaffinity(0, share)
    return Placement(len(share), tuple(share) if bound else None)


def share_of(cores: Sequence[int], index: int, ranks: int) -> Sequence[int]:
    """An even part, of neighbours, which share caches; one core at least."""
    if len(cores) < ranks:
        return [cores[index % len(cores)]]
    return cores[index * len(cores) // ranks : (index + 1) * len(cores) // ranks]


def _usable_cores() -> list[int]:
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))


def _offered_on_this_host(world: World, cores: list[int]) -> list[list[int]]:
    """The cores that each rank of this host may use, in the order of local ranks."""
    offered = world.gather((world.local_rank, cores))
    first = world.rank - world.local_rank
    following = range(first + 1, world.size)
    beyond = next((rank for rank in following if offered[rank][0] == 0), world.size)
    return [cores for _, cores in offered[first:beyond]]
