"""One run folder, one writer."""

from __future__ import annotations

import fcntl
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from pipeline.errors import ConfigError
from pipeline.run_folder.layout import LOCK_FILE


@contextmanager
def lock_run_folder(folder: Path) -> Iterator[None]:
    """Hold the folder against other runs; a process that dies lets go of it.

    Raises:
        ConfigError: another run is writing there; names it.
    """
    path = folder / LOCK_FILE
    file = _acquire(path)
    try:
        file.truncate(0)
        file.write(json.dumps({"host": socket.gethostname(), "pid": os.getpid()}))
        file.flush()
        yield
    finally:
        with suppress(OSError):  # a disk that has become read-only: the lock goes with the file's closing
            path.unlink()
        file.close()


def _acquire(path: Path) -> IO[str]:
    while True:
        file = path.open("a+", encoding="utf-8")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise ConfigError(
                f"run.out_dir: {path.parent} is in use by another run ({_holder(path)}); "
                "wait for it, or name another folder"
            ) from None
        # The holder before may have removed the file between our opening and locking it.
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file
        file.close()


def _holder(path: Path) -> str:
    with suppress(OSError, ValueError, KeyError, TypeError):
        holder = json.loads(path.read_text(encoding="utf-8"))
        return f"{holder['host']}, pid {holder['pid']}"
    return "unknown"
