"""Lock folders with ``flock``. When a process dies, the kernel releases its locks.

Several processes can hold a shared lock at the same time. Only one process can hold an exclusive lock.
"""

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from data_tools.errors import DataError, one_line_write_errors

LOCK_NAME = "writing.lock"
# The content of the lock file while a process holds the folder exclusively, possibly for hours.
_EXCLUSIVE = b"not shared"
_WAIT_S = 0.05
_LONGEST_CONTENT = 4096


class LockHeldError(Exception):
    """Another process holds the lock. ``content`` is the content of the lock file."""

    def __init__(self, content: bytes) -> None:
        super().__init__("another process holds the lock")
        self.content = content


class FileLock:
    """A lock file on which this process holds a lock. Use ``acquire_lock`` to get an instance."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)

    def acquire(self, content: bytes | None) -> bool:
        """Lock the file, and return True. If another process has removed the file, return False.

        ``acquire_lock`` describes ``content`` and the errors.
        """
        operation = fcntl.LOCK_SH if content is None else fcntl.LOCK_EX
        while not _try_flock(self._descriptor, operation):
            held_by = os.pread(self._descriptor, _LONGEST_CONTENT, 0)
            # A process that called make_exclusive leaves the file empty and finishes soon.
            if content is not None or held_by:
                raise LockHeldError(held_by)
            time.sleep(_WAIT_S)
        if not self._is_in_place():
            return False
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, content or b"", 0)
        return True

    def make_exclusive(self) -> bool:
        """Change a shared lock to an exclusive lock. Return whether this was possible.

        If other processes also hold the lock, this call only releases the lock of this process. When every process
        calls this method after its work, only the last call returns True.
        """
        # Unlock first. If two processes kept their shared locks, neither of them could get the exclusive lock.
        fcntl.flock(self._descriptor, fcntl.LOCK_UN)
        return _try_flock(self._descriptor, fcntl.LOCK_EX) and self._is_in_place()

    def release(self) -> None:
        """Release the lock. If no other process holds the lock, remove the lock file."""
        try:
            # In a deleted or read-only folder, the file cannot be removed. Closing it still releases the lock.
            with suppress(OSError):
                if self.make_exclusive():
                    self._path.unlink()
        finally:
            self.close()

    def close(self) -> None:
        """Release the lock, but keep the lock file."""
        os.close(self._descriptor)

    def _is_in_place(self) -> bool:
        """Return whether the open file is still in the folder. Another process may have removed it."""
        with suppress(FileNotFoundError):
            return os.path.samestat(os.fstat(self._descriptor), self._path.stat())
        return False


def acquire_lock(path: Path, content: bytes | None) -> FileLock:
    """Acquire a lock on a lock file. The caller must release the lock.

    If ``content`` is None, the lock is shared. Otherwise, it is exclusive, and ``content`` is written into the file.

    A lock from ``FileLock.make_exclusive`` is held only briefly. A call for a shared lock therefore waits until such a
    lock is released, and does not raise LockHeldError.

    Raises:
        LockHeldError: another process holds a lock that excludes this one.
        OSError: the file cannot be created or written.
    """
    while True:
        lock = FileLock(path)
        try:
            if lock.acquire(content):
                return lock
        except LockHeldError:
            lock.close()
            raise
        except BaseException:  # a full disk, or Ctrl-C
            lock.release()
            raise
        lock.close()


@contextmanager
def lock_folder(folder: Path, *, shared: bool) -> Iterator[FileLock]:
    """Return a context manager that holds a shared or an exclusive lock on a folder during its ``with`` block.

    Raises:
        DataError: another process holds a lock that excludes this one.
    """
    path = folder / LOCK_NAME
    with one_line_write_errors(path):
        try:
            lock = acquire_lock(path, None if shared else _EXCLUSIVE)
        except LockHeldError as error:
            raise _being_written(folder) from error
    try:
        yield lock
    finally:
        lock.release()


@contextmanager
def waiting_for_lock(path: Path) -> Iterator[None]:
    """Return a context manager that waits for an exclusive lock on a file, and holds the lock inside its block."""
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def lock_without_file(folder: Path) -> Iterator[None]:
    """Return a context manager that locks a folder exclusively during its ``with`` block, without a lock file.

    Raises:
        DataError: another process holds the lock.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        if not _try_flock(descriptor, fcntl.LOCK_EX):
            raise _being_written(folder)
        yield
    finally:
        os.close(descriptor)


def _try_flock(descriptor: int, operation: int) -> bool:
    try:
        fcntl.flock(descriptor, operation | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _being_written(folder: Path) -> DataError:
    return DataError(f"{folder} is being written by another process; wait for it or end it")
