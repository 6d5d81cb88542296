"""One folder: one writer, or several that share it."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from data_tools.errors import DataError, one_line_write_errors

LOCK_NAME = "writing.lock"
# In the file while a run has the folder to itself, which may take hours; whoever shares it has it alone for moments.
_NOT_SHARED = b"not shared"
_WAIT_S = 0.05


class FolderLock:
    """Holds a folder; make one with ``lock_folder``. A process that dies lets go of it."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self._path = path
        self._descriptor = descriptor

    def make_exclusive(self) -> bool:
        """Have the folder alone, if nobody else holds it; otherwise it is no longer held.

        Of several that share it and end with this call, the last one succeeds.
        """
        # Letting go first: of two that both held on, neither would be the last.
        fcntl.flock(self._descriptor, fcntl.LOCK_UN)
        return self._try(fcntl.LOCK_EX) and _is_at(self._descriptor, self._path)

    def acquire(self, *, shared: bool) -> bool:
        """Wait for others that share the folder; False: the file was removed meanwhile, and does not count.

        Raises:
            DataError: somebody has the folder, and does not share it.
        """
        while not self._try(fcntl.LOCK_SH if shared else fcntl.LOCK_EX):
            if not shared or os.pread(self._descriptor, len(_NOT_SHARED), 0) == _NOT_SHARED:
                raise DataError(f"{self._path.parent} is being written by another process; wait for it or end it")
            time.sleep(_WAIT_S)
        if not _is_at(self._descriptor, self._path):
            return False
        os.ftruncate(self._descriptor, 0)
        if not shared:
            os.pwrite(self._descriptor, _NOT_SHARED, 0)
        return True

    def release(self) -> None:
        """Let go; whoever is the last removes the file."""
        try:
            # The folder may be gone, or the disk have become read-only: the lock goes with the closing.
            with suppress(OSError):
                if self.make_exclusive():
                    self._path.unlink()
        finally:
            os.close(self._descriptor)

    def _try(self, operation: int) -> bool:
        try:
            fcntl.flock(self._descriptor, operation | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True


@contextmanager
def lock_folder(folder: Path, *, shared: bool) -> Iterator[FolderLock]:
    """Hold a folder, alone or with others that share it.

    Raises:
        DataError: somebody else has it, or it cannot be written.
    """
    lock = _acquire(folder / LOCK_NAME, shared=shared)
    try:
        yield lock
    finally:
        lock.release()


def _acquire(path: Path, *, shared: bool) -> FolderLock:
    while True:
        with one_line_write_errors(path):
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                lock = FolderLock(path, descriptor)
                if lock.acquire(shared=shared):
                    return lock
            except BaseException:
                os.close(descriptor)
                raise
        os.close(descriptor)


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether the file is still under its name: the holder before may have removed it."""
    with suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(descriptor), path.stat())
    return False


@contextmanager
def lock_without_file(folder: Path) -> Iterator[None]:
    """Hold a lock on an open folder itself, so that no lock file appears in it.

    Raises:
        DataError: another process holds it.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise DataError(f"{folder} is being written by another process; wait for it or end it") from error
        yield
    finally:
        os.close(descriptor)
