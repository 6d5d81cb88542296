"""Read how much memory this process may use, and whether the kernel has killed processes because memory was short."""

import os
import socket
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from data_tools.formatting import format_size

_PROC = Path("/proc")
_CGROUPS = Path("/sys/fs/cgroup")
#: Each file has one name in version 2 of Linux's control groups, and another name in version 1.
_LIMIT_FILES = ("memory.max", "memory.limit_in_bytes")
_EVENT_FILES = ("memory.events", "memory.oom_control")


def available_memory() -> int:
    """Return how many bytes of memory this process and its children can use.

    This is the memory of the machine, or the smaller limit of a control group. Containers, Slurm and Kubernetes set
    such limits. If the processes need more, the kernel kills one of them with SIGKILL.
    """
    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for folder in _memory_groups():
        for name in _LIMIT_FILES:
            with suppress(OSError, ValueError):  # ValueError: the file contains "max"
                limits.append(int((folder / name).read_text()))
    return min(limits)


class MemoryKills:
    """Counts the processes that the kernel kills, after the creation of this object, because memory is short."""

    def __init__(self) -> None:
        self._before = _count_kills()

    def __str__(self) -> str:
        """Return a text that says how many processes the kernel has killed, or "" if it has killed none."""
        count = _count_kills() - self._before
        if count < 1:
            return ""
        processes = "1 process" if count == 1 else f"{count:,} processes"
        return (
            f"the kernel of {socket.gethostname()} has killed {processes} since the start of this command, because "
            f"memory was short (the limit is {format_size(available_memory())})"
        )


def _count_kills() -> int:
    """Return how many processes the kernel has killed because memory was short. Without Linux, return 0.

    Count the processes of this control group, or of a group around it. If no group has a counter, count all processes
    of the machine.
    """
    files = [folder / name for folder in _memory_groups() for name in _EVENT_FILES]
    for path in (*files, _PROC / "vmstat"):
        with suppress(OSError, ValueError):
            for line in path.read_text().splitlines():
                name, _, value = line.partition(" ")
                if name == "oom_kill":
                    return int(value)
    return 0


def _memory_groups() -> Iterator[Path]:
    """Yield the folder of this process's control group for memory, and then the folders of the groups around it.

    In a container, the first folders may not exist, because the container sees only its own part of the tree.
    """
    with suppress(OSError):
        for line in (_PROC / "self" / "cgroup").read_text().splitlines():
            _, controllers, group = line.split(":", 2)
            if controllers and "memory" not in controllers.split(","):
                continue
            root = _CGROUPS / "memory" if controllers else _CGROUPS
            folder = root / group.strip("/")
            yield from (parent for parent in (folder, *folder.parents) if parent.is_relative_to(root))
