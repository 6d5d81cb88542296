"""Write files and folders atomically and durably. A file or folder with its final name is always complete.

The functions write to a temporary name, which is called the *aside* path. Then they call fsync, and rename the file or
folder to its final name. If the program crashes before the rename, an older file with the final name has not changed.
The file or folder at the aside path remains, and the next write replaces it.

If several processes write into one folder, one of them must call ``make_empty_folder`` before the others begin. After
all have finished, it must call ``publish_folder``.
"""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from data_tools.storage.locks import lock_without_file

PARTIAL_SUFFIX = ".partial"


def partial_path(path: Path) -> Path:
    """Return a temporary path in the folder of ``path``, for example ``x.json.partial`` for ``x.json``."""
    return path.with_name(path.name + PARTIAL_SUFFIX)


def hidden_partial_path(path: Path) -> Path:
    """Return a hidden temporary path in the folder of ``path``: ``.step_00000001.partial`` for ``step_00000001``."""
    return path.with_name(f".{path.name}{PARTIAL_SUFFIX}")


def fsync_file(path: Path) -> None:
    """Fsync a file that another library or process has written. Its contents then survive a power failure."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def fsync_folder(path: Path) -> None:
    """Fsync a folder. Changes to the names of its files (create, rename, remove) then survive a power failure."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def publish(aside: Path, target: Path) -> None:
    """Rename ``aside`` to ``target`` atomically, and fsync the parent folder. ``aside`` must be complete and fsynced.

    If ``aside`` is a file, it may replace an existing file. If ``aside`` is a folder, it may replace only an empty
    folder.

    Raises:
        OSError: ``aside`` does not exist, or ``target`` cannot be replaced.
    """
    os.replace(aside, target)
    fsync_folder(target.parent)


@contextmanager
def atomic_file(path: Path, aside: Path | None = None, *, durable: bool = True) -> Iterator[BinaryIO]:
    """Return a context manager for writing a file. Its ``with`` block gets a new file, which then replaces ``path``.

    If the block raises an error, the new file is deleted, and ``path`` does not change.

    Args:
        path: the final name. Its folder must exist.
        aside: the temporary name of the file, on the same file system. None means ``partial_path(path)``.
        durable: whether the new file and its name are fsynced. If False, the caller must fsync them later.

    Raises:
        OSError: the file cannot be written, for example because the disk is full or the folder is read-only.
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
        with suppress(OSError):  # closing flushes the buffer, which fails again if the disk is full
            file.close()
        # If the block never ended, this code runs at garbage collection, when another writer may use the same path.
        if not isinstance(error, GeneratorExit):
            aside.unlink(missing_ok=True)
        raise


def write_bytes_durably(path: Path, content: bytes) -> None:
    """Write a whole file atomically. If the call raises ``OSError``, a file that existed before has not changed."""
    with atomic_file(path) as file:
        file.write(content)


def write_json_durably(path: Path, value: Any) -> None:
    """Write a value to a file atomically, as indented ASCII JSON with a final newline. Keys keep their order."""
    text = json.dumps(value, indent=2, allow_nan=False) + "\n"
    write_bytes_durably(path, text.encode("ascii"))


@contextmanager
def atomic_folder(target: Path, aside: Path | None = None) -> Iterator[Path]:
    """Return a context manager for writing a folder. Its ``with`` block gets an empty folder with a temporary name.

    At the end of the block, the folder is renamed to ``target``. If the block raises an error, the folder is deleted.
    Inside the block, the folder is locked. If a killed process has left a folder with the temporary name, its contents
    are deleted first.

    Args:
        target: the final name. It must not exist yet, or it must be an empty folder.
        aside: the temporary name of the folder, on the same file system. None means ``hidden_partial_path(target)``.

    Raises:
        DataError: another process is writing to the folder.
        OSError: the folder cannot be written, for example because the disk is full or ``target`` is not empty.
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
    """Fsync everything in the temporary folder ``aside``, rename ``aside`` to ``target``, and fsync the parent folder.

    Processes on other machines must fsync the files that they have written into ``aside`` before this call.

    Raises:
        OSError: ``target`` is a file, ``target`` is a folder that is not empty, or the disk reports an error.
    """
    for folder, _, names in os.walk(aside):
        for name in names:
            fsync_file(Path(folder, name))
        fsync_folder(Path(folder))
    publish(aside, target)
