"""Configure the threads, the cores and the memory allocator of this process."""

import ctypes
import os
from collections.abc import Sequence

import torch

from data_tools.formatting import count_of
from data_tools.limits import core_limit
from pipeline.distributed.environment import requested_threads, set_openmp_threads
from pipeline.distributed.world import World

# Parameters of mallopt(3), from glibc's <malloc.h>.
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8


def configure_cpu(world: World) -> str:
    """Configure the memory allocator, threads and cores of this process. Return a line for the log.

    Every rank must call this, before large computations.
    """
    if world.device.type == "cpu":
        keep_freed_memory()
    return share_cores(world)


def share_cores(world: World) -> str:
    """Divide the cores of this host among its ranks, one thread per core. Return a line for the log.

    If a control group limits the ranks to fewer cores (see ``core_limit``), they get fewer threads.

    A rank on a CPU is bound to its cores, because a thread loses its cache when it moves to another core. A rank on a
    GPU is not bound, because the threads of NCCL need other cores.

    If the user has set ``OMP_NUM_THREADS``, each rank uses this number of threads, but at most one per core, and is not
    bound. If a launcher has already chosen cores for each rank, the ranks keep these cores. Every rank must call this.
    """
    cores = _usable_cores()
    if requested := requested_threads():
        threads = min(requested, len(cores))  # OpenMP crashes if it cannot start all threads
        torch.set_num_threads(threads)
        set_openmp_threads(threads)
        return f"{threads} per process{f' (OMP_NUM_THREADS is {requested:,})' if requested > threads else ''}"
    cores_of_ranks = _cores_of_local_ranks(world, cores)
    ranks = len(cores_of_ranks)
    are_shared = ranks > 1 and all(other == cores for other in cores_of_ranks)
    own = split_cores(cores, world.local_rank, ranks) if are_shared else cores
    limit = core_limit()
    threads = min(len(own), max(1, limit // ranks)) if limit else len(own)
    torch.set_num_threads(threads)
    reason = f" (the container or job may use {count_of(limit, 'core')})" if limit and threads < len(own) else ""
    if world.device.type == "cuda":
        set_openmp_threads(threads)
    elif are_shared and len(cores) >= ranks and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, own)
        return f"{threads} per process{reason}, bound to cores {', '.join(map(str, own))}"
    return f"{threads} per process{reason}"


def split_cores(cores: Sequence[int], index: int, ranks: int) -> Sequence[int]:
    """Return adjacent cores for one rank of a host, because adjacent cores share caches.

    If there are fewer cores than ranks, several ranks get the same core.

    Args:
        index: the number of the rank on this host.
        ranks: the number of ranks on this host.
    """
    if len(cores) < ranks:
        return [cores[index % len(cores)]]
    return cores[index * len(cores) // ranks : (index + 1) * len(cores) // ranks]


def _usable_cores() -> list[int]:
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))


def _cores_of_local_ranks(world: World, cores: list[int]) -> list[list[int]]:
    gathered = world.gather((world.local_rank, cores))
    first = world.rank - world.local_rank
    next_host = next((rank for rank in range(first + 1, world.size) if gathered[rank][0] == 0), world.size)
    return [cores for _, cores in gathered[first:next_host]]


def keep_freed_memory() -> None:
    """Make malloc keep freed memory for the next allocation. This has no effect without glibc.

    By default, malloc gets each block of more than 32 MiB from the operating system, which fills the block with zeros.
    Filling blocks such as logits and gradients would take a fifth of the time of each training step.

    All threads use the main arena of malloc, because only this arena can keep large blocks.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):  # macOS, musl; Windows
        return
    for setting, value in ((_M_ARENA_MAX, 1), (_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, -1)):
        mallopt(setting, value)
