"""Create and lock a run folder, so that only one process writes to it at a time."""

import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from data_tools.errors import one_line_write_errors
from data_tools.shards.manifest import MANIFEST_NAME
from data_tools.storage.locks import LockHeldError, acquire_lock
from data_tools.storage.new_folders import create_folder, removed_if_unused
from pipeline.errors import ConfigError
from pipeline.run_folder.layout import CHECKPOINTS_FOLDER, CONFIG_FILE, LOCK_FILE


@contextmanager
def open_run_folder(folder: Path) -> Iterator[None]:
    """Return a context manager that creates a run folder and locks it.

    If its ``with`` block raises an error and has written no file, the folders that were created are removed.

    Raises:
        ConfigError: the folder cannot be created, is not writable, is inside the checkpoints of another run, contains
            other things than a run, or another process holds the lock.
        DataError: the lock file cannot be written.
    """
    with removed_if_unused(_create_run_folder(folder)), lock_run_folder(folder):
        yield


def _create_run_folder(folder: Path) -> list[Path]:
    """Create a run folder. Return the folders that did not exist before."""
    if reason := why_not_a_run_folder(folder):
        raise ConfigError(f"run.out_dir: {reason}; name a folder for the run alone, such as runs/gpt2")
    for parent in (folder.absolute(), folder.absolute().parent):
        if parent.name == CHECKPOINTS_FOLDER and (parent.parent / CONFIG_FILE).exists():
            raise ConfigError(
                f"run.out_dir: {folder} is inside the checkpoints of the run {parent.parent}, which deletes old "
                f"checkpoints; name another folder, or continue that run with --set run.out_dir={parent.parent}"
            )
    try:
        created = create_folder(folder)
    except OSError as error:
        raise ConfigError(
            f"run.out_dir: cannot make {folder} ({error.strerror}); name a folder that you can write to"
        ) from None
    if not os.access(folder, os.W_OK):
        raise ConfigError(f"run.out_dir: {folder} is not writable; name a folder that you can write to")
    return created


def why_not_a_run_folder(folder: Path) -> str | None:
    """Return why a run must not write into a folder, or None if it may. The folder need not exist."""
    place = folder.resolve()
    with suppress(RuntimeError):  # this user has no home folder
        home = Path.home().resolve()
        if place in (home, *home.parents):
            return f"{folder} is the home folder {home}, or contains it"
    with suppress(OSError, ValueError):  # an unreadable folder is another error; a run replaces a damaged config
        if (place / MANIFEST_NAME).exists():
            return f"{folder} holds token shards or a checkpoint ({MANIFEST_NAME}), and not a run"
        content = json.loads((place / CONFIG_FILE).read_bytes())
        if isinstance(content, dict) and "run" not in content:
            return f"{folder} holds the {CONFIG_FILE} of another program, which a run would replace"
    return None


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
