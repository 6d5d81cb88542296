"""Write files and folders atomically and durably. A file or folder with its final name is always complete.

Everything is written under a temporary name (the *aside* path), fsynced, and renamed to its final name. After a crash,
the next write replaces what is left at the aside path.

If several processes write into one folder, one of them calls ``make_empty_folder`` first. Then each process writes and
fsyncs its files. Last, one of them fsyncs the folder and calls ``publish``.
"""

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from data_tools.storage.locks import lock_without_file

PARTIAL_SUFFIX = ".partial"
#: Errors of the operating system that only a write can cause: the disk or a quota is full, or the disk is read-only.
WRITE_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG)


def partial_path(path: Path) -> Path:
    """Return a temporary path in the same folder, for example ``x.json.partial`` for ``x.json``."""
    return path.with_name(path.name + PARTIAL_SUFFIX)


def hidden_partial_path(path: Path) -> Path:
    """Return a hidden temporary path in the same folder: ``.step_00000001.partial`` for ``step_00000001``."""
    return path.with_name(f".{path.name}{PARTIAL_SUFFIX}")


def fsync_file(path: Path) -> None:
    """Fsync a file that another library or process has written."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def drop_from_page_cache(path: Path) -> None:
    """Ask the system to drop its copy of a file from memory, so that the next read comes from the disk or the server.

    Fsync the file before this call, because the system keeps bytes that it has not written yet. This is best effort:
    macOS and Windows always keep the copy, other systems may keep it, and the disk can answer from its own cache.
    """
    if hasattr(os, "posix_fadvise"):
        with open(path, "rb") as file, suppress(OSError):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def fsync_folder(path: Path) -> None:
    """Fsync a folder, which makes the creation, renaming and removal of its files durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def publish(aside: Path, target: Path) -> None:
    """Rename ``aside`` to ``target`` atomically, and fsync the parent folder. Fsync ``aside`` before this call.

    A file may replace a file. A folder may replace only an empty folder.
    """
    os.replace(aside, target)
    fsync_folder(target.parent)


@contextmanager
def atomic_file(path: Path, aside: Path | None = None, *, durable: bool = True) -> Iterator[BinaryIO]:
    """Return a context manager for writing a file. Its ``with`` block gets a new file, which then replaces ``path``.

    If the block raises an error, the new file is deleted, and ``path`` does not change.

    Args:
        path: the final name. Its folder must exist.
        aside: the temporary name, on the same file system. None means ``partial_path(path)``.
        durable: whether to fsync the file and its folder. If False, the caller must do this.
    """
    aside = aside or partial_path(path)
    file = open(aside, "wb")  # noqa: SIM115 (closed before the rename, which can fail)
    try:
        yield file
        file.flush()
        if durable:
            os.fsync(file.fileno())
        file.close()
        if durable:
            publish(aside, path)
        else:
            os.replace(aside, path)
    except BaseException as error:
        if isinstance(error, OSError) and error.errno in WRITE_ERRORS and error.filename is None:
            error.filename = str(path)  # write(2) and fsync(2) do not name the file
        with suppress(OSError):  # closing flushes the buffer, which fails again if the disk is full
            file.close()
        # GeneratorExit: garbage collection runs this code late. Another writer may then use the same path.
        if not isinstance(error, GeneratorExit):
            aside.unlink(missing_ok=True)
        raise


def write_bytes_durably(path: Path, content: bytes) -> None:
    """Write a whole file atomically. If ``OSError`` is raised, an existing file has not changed."""
    with atomic_file(path) as file:
        file.write(content)


def write_json_durably(path: Path, value: Any) -> None:
    """Write a value to a file atomically, as indented ASCII JSON. Keys keep their order."""
    text = json.dumps(value, indent=2, allow_nan=False) + "\n"
    write_bytes_durably(path, text.encode("ascii"))


@contextmanager
def atomic_folder(target: Path, aside: Path | None = None) -> Iterator[Path]:
    """Return a context manager for writing a folder. Its ``with`` block gets an empty folder with a temporary name.

    After the block, the folder is renamed to ``target``. If the block raises an error, the folder is deleted. During
    the block, the folder is locked.

    Args:
        target: the final name. It must be an empty folder or not exist.
        aside: the temporary name, on the same file system. Old contents are deleted. None means
            ``hidden_partial_path(target)``.

    Raises:
        DataError: another process is writing to the folder.
    """
    target = Path(os.path.abspath(target))
    aside = aside or hidden_partial_path(target)
    aside.mkdir(parents=True, exist_ok=True)
    with lock_without_file(aside):
        try:
            make_empty_folder(aside)
            yield aside
            publish_folder(aside, target)
        except BaseException:
            shutil.rmtree(aside, ignore_errors=True)
            raise


def make_empty_folder(folder: Path) -> None:
    """Create a folder and its parents. If the folder exists, delete its contents."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def publish_folder(aside: Path, target: Path) -> None:
    """Fsync everything in the folder ``aside``, then rename it to ``target`` with ``publish``."""
    for folder, _, names in os.walk(aside):
        for name in names:
            fsync_file(Path(folder, name))
        fsync_folder(Path(folder))
    publish(aside, target)
