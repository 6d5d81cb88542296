"""The lock of a C++ extension that torch builds at first use: a build that was killed leaves it behind.

torch waits for it to go, without an end (``torch.utils.file_baton``), so every later run would hang.
"""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path

from torch.utils.cpp_extension import _get_build_directory

log = logging.getLogger(__name__)

#: A build takes a minute; whoever has had the lock for longer, and is not seen to hold it, is gone.
LONGEST_BUILD_S = 300.0
_POLL_S = 0.5


def expect_no_dead_build(extension: str) -> None:
    """Return once nobody builds the extension, or somebody on this host does, for whom torch can wait."""
    clear_dead_lock(Path(_get_build_directory(extension, verbose=False)) / "lock")


def clear_dead_lock(lock: Path) -> None:
    """Remove a lock whose owner is gone; one of another host, on a shared home, is given time to go by itself."""
    while (age_s := _age_s(lock)) is not None and not _is_open_on_this_host(lock):
        if age_s > LONGEST_BUILD_S:
            log.warning("removed %s: the build that left it there is gone", lock)
            lock.unlink(missing_ok=True)
            return
        time.sleep(_POLL_S)


def _age_s(lock: Path) -> float | None:
    try:
        return time.time() - lock.stat().st_mtime
    except FileNotFoundError:
        return None


def _is_open_on_this_host(lock: Path) -> bool:
    """Whether a process has it open, as its owner does; without /proc nobody is seen."""
    for descriptor in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            if os.path.samestat(descriptor.stat(), lock.stat()):
                return True
        except OSError:  # it has just been closed, is another user's, or the lock is gone
            continue
    return False
