"""Read the limits of this process's control groups. Containers, Slurm and Kubernetes set limits of memory and cores.

Linux has control groups of version 1 and of version 2. The files of the two versions have different names.
"""

import math
import os
import socket
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from data_tools.formatting import count_of, format_size

_PROC = Path("/proc")
_CGROUPS = Path("/sys/fs/cgroup")
_LIMIT_FILES = ("memory.max", "memory.limit_in_bytes")
_EVENT_FILES = ("memory.events", "memory.oom_control")


def memory_limit() -> int:
    """Return the memory of the machine in bytes, or the smaller limit of a control group.

    If this process and its children need more, the kernel kills one of them with SIGKILL.
    """
    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for folder in _groups("memory"):
        for name in _LIMIT_FILES:
            with suppress(OSError, ValueError):  # ValueError: the file contains "max"
                limits.append(int((folder / name).read_text()))
    return min(limits)


def available_cores() -> int:
    """Return how many CPU cores this process and its children can use at the same time."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, core_limit() or cores)


def core_limit() -> int | None:
    """Return the smallest limit of a control group in cores, rounded up, or None if no group has a limit.

    If the processes of the group use more cores, the kernel stops all of them for a part of each tenth of a second.
    Threads that wait for each other are then much slower than a single thread.
    """
    limits: list[float] = []
    for folder in _groups("cpu"):
        with suppress(OSError, ValueError):  # ValueError: the file contains "max"
            quota_us, period_us = map(int, (folder / "cpu.max").read_text().split())
            limits.append(quota_us / period_us)
        with suppress(OSError, ValueError):
            quota_us, period_us = (int((folder / f"cpu.cfs_{name}_us").read_text()) for name in ("quota", "period"))
            if quota_us > 0:  # -1 means no limit
                limits.append(quota_us / period_us)
    return math.ceil(min(limits)) if limits else None


class MemoryKills:
    """Counts the processes that the kernel kills, after the creation of this object, because memory is short."""

    def __init__(self) -> None:
        self._before = _count_kills()

    def describe(self) -> str | None:
        """Return a text that says how many processes the kernel has killed, or None if it has killed none."""
        count = _count_kills() - self._before
        if count < 1:
            return None
        killed = count_of(count, "process", "processes")
        return (
            f"the kernel of {socket.gethostname()} has killed {killed} since the start of this command, because "
            f"memory was short (the limit is {format_size(memory_limit())})"
        )


def _count_kills() -> int:
    """Return how many processes the kernel has killed because memory was short. Without Linux, return 0.

    Count the processes of this control group, or of a group around it. If no group has a counter, count all processes
    of the machine.
    """
    files = [folder / name for folder in _groups("memory") for name in _EVENT_FILES]
    for path in (*files, _PROC / "vmstat"):
        with suppress(OSError, ValueError):
            for line in path.read_text().splitlines():
                name, _, value = line.partition(" ")
                if name == "oom_kill":
                    return int(value)
    return 0


def _groups(controller: str) -> Iterator[Path]:
    """Yield the folder of this process's control group, and then the folders of the groups around it.

    In a container, the first folders may not exist, because the container sees only its own part of the tree.

    Args:
        controller: ``memory`` or ``cpu``. Version 1 has one tree of groups per controller.
    """
    with suppress(OSError):
        for line in (_PROC / "self" / "cgroup").read_text().splitlines():
            _, controllers, group = line.split(":", 2)
            if controllers and controller not in controllers.split(","):
                continue
            root = _CGROUPS / controller if controllers else _CGROUPS
            folder = root / group.strip("/")
            yield from (parent for parent in (folder, *folder.parents) if parent.is_relative_to(root))
