"""Lock a run folder, so that only one process writes to it at a time."""

import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from data_tools.errors import one_line_write_errors
from data_tools.storage.locks import LockHeldError, acquire_lock
from pipeline.errors import ConfigError
from pipeline.run_folder.layout import LOCK_FILE


@contextmanager
def lock_run_folder(folder: Path) -> Iterator[None]:
    """Return a context manager that locks a run folder. If this process dies, the kernel releases the lock.

    Raises:
        ConfigError: another process holds the lock.
        DataError: the lock file cannot be written.
    """
    holder = json.dumps({"host": socket.gethostname(), "pid": os.getpid()})
    try:
        with one_line_write_errors(folder / LOCK_FILE):
            lock = acquire_lock(folder / LOCK_FILE, holder.encode())
    except LockHeldError as error:
        raise ConfigError(
            f"run.out_dir: {folder} is in use by another run ({_holder(error.content)}); "
            "wait for it, or name another folder"
        ) from None
    try:
        yield
    finally:
        lock.release()


def is_locked(folder: Path) -> bool:
    """Return whether a process holds the lock of a run folder.

    If the lock file names a process on another host, the result is True.
    """
    try:
        holder = json.loads((folder / LOCK_FILE).read_text(encoding="utf-8"))
        is_here, pid = holder["host"] == socket.gethostname(), int(holder["pid"])
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return psutil.pid_exists(pid) if is_here else True


def _holder(content: bytes) -> str:
    with suppress(ValueError, KeyError, TypeError):
        holder = json.loads(content)
        return f"{holder['host']}, pid {holder['pid']}"
    return "unknown"
