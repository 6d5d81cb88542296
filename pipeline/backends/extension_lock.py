"""Remove the lock file of an extension build that was killed.

While torch builds a C++ extension, a lock file exists. If the build is killed, the lock file remains. The next process
that needs the extension would then wait forever (``torch.utils.file_baton``).
"""

import logging
import os
import tempfile
import time
from pathlib import Path

from torch.utils.cpp_extension import _get_build_directory

log = logging.getLogger(__name__)

#: A lock file of this age is dead if no process on this host has it open. A build takes about a minute.
LONGEST_BUILD_S = 300.0
_POLL_S = 0.5


def wait_for_build_elsewhere(extension: str) -> None:
    """Wait until no other host builds the C++ extension. Remove the lock file of a build that was killed.

    Call this before the extension is used.
    """
    clear_dead_lock(Path(_get_build_directory(extension, verbose=False)) / "lock")


def clear_dead_lock(lock: Path) -> None:
    """Wait until no build on another host holds the lock file. Remove the file if its build was killed.

    If a process on this host has the file open, return at once, because torch itself waits for this build. Otherwise,
    wait until the file disappears. If the file is older than ``LONGEST_BUILD_S`` seconds, the build counts as killed.
    """
    while (age_s := _age_s(lock)) is not None and not _is_open_on_this_host(lock):
        if age_s > LONGEST_BUILD_S:
            log.warning("removed %s, which a build that is gone left behind", lock)
            lock.unlink(missing_ok=True)
            return
        time.sleep(_POLL_S)


def _age_s(lock: Path) -> float | None:
    """Return the age of the lock file in seconds, or None if there is no lock file.

    The file server dates a new file. Therefore, a wrong clock of a host does not change the result.
    """
    try:
        locked_at_s = lock.stat().st_mtime
        with tempfile.TemporaryFile(dir=lock.parent) as now:
            return os.fstat(now.fileno()).st_mtime - locked_at_s
    except FileNotFoundError:
        return None


def _is_open_on_this_host(lock: Path) -> bool:
    """Return whether a process on this host has the lock open. Without /proc, return False."""
    for descriptor in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            if os.path.samestat(descriptor.stat(), lock.stat()):
                return True
        except OSError:  # the descriptor was closed or belongs to another user, or the lock was removed
            continue
    return False
