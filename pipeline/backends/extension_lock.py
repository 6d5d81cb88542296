"""Remove the lock file of an extension build that was killed.

torch builds a C++ extension when it is first used, and creates a lock file during the build. If the build is killed,
the file remains. Every later run would hang, because torch (``torch.utils.file_baton``) waits without a time limit
until the file disappears.
"""

import logging
import os
import time
from pathlib import Path

from torch.utils.cpp_extension import _get_build_directory

log = logging.getLogger(__name__)

#: A lock is dead if it is older and no process on this host has it open. A build takes about a minute.
LONGEST_BUILD_S = 300.0
_POLL_S = 0.5


def wait_for_build_elsewhere(extension: str) -> None:
    """Make sure that no old lock file blocks torch when it loads a C++ extension.

    If a build of the extension was killed, remove its lock file. If a process on another host may still be building the
    extension, wait. Call this function before the extension is used.

    Args:
        extension: the name of the C++ extension.
    """
    clear_dead_lock(Path(_get_build_directory(extension, verbose=False)) / "lock")


def clear_dead_lock(lock: Path) -> None:
    """Remove a lock file if the build that created it was killed. If the build may still be running elsewhere, wait.

    If a process on this host has the file open, the build is running, and this function returns. Otherwise, the build
    was killed, or it is running on another host with the same home folder. Therefore, the function waits for the other
    host to remove the file. If the file becomes older than ``LONGEST_BUILD_S`` seconds, the function assumes that the
    build was killed, and removes the file.
    """
    while (age_s := _age_s(lock)) is not None and not _is_open_on_this_host(lock):
        if age_s > LONGEST_BUILD_S:
            log.warning("removed %s, which a build that is gone left behind", lock)
            lock.unlink(missing_ok=True)
            return
        time.sleep(_POLL_S)


def _age_s(lock: Path) -> float | None:
    try:
        return time.time() - lock.stat().st_mtime
    except FileNotFoundError:
        return None


def _is_open_on_this_host(lock: Path) -> bool:
    """Return whether a process on this host has the lock open. Returns False on a system without /proc."""
    for descriptor in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            if os.path.samestat(descriptor.stat(), lock.stat()):
                return True
        except OSError:  # the descriptor was closed or belongs to another user, or the lock was removed
            continue
    return False
