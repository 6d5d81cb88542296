"""A new folder that appears whole, or not at all."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from data_tools.errors import DataError
from data_tools.storage.files import TEMPORARY_SUFFIX, fsync_folder, one_line_write_errors


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """Give a hidden folder beside ``out`` to write into, which becomes ``out`` when the block ends without an error.

    An error removes it. A kill leaves it, hidden and unlike a result, and the next attempt clears it away.

    Raises:
        DataError: ``out`` is a file, not empty, a mount point, being written by another process, or not to be written.
    """
    expect_new(out)
    target = Path(os.path.abspath(out))
    staging = target.with_name(f".{target.name}{TEMPORARY_SUFFIX}")
    with one_line_write_errors(out):
        staging.mkdir(parents=True, exist_ok=True)
    with _locked(staging):
        try:
            with one_line_write_errors(out):
                _empty(staging)
            yield staging
            with one_line_write_errors(out):
                fsync_folder(staging)
                os.replace(staging, target)
                fsync_folder(target.parent)
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            raise


def expect_new(out: Path) -> None:
    """Check that a folder is not there yet, or empty.

    Raises:
        DataError: it is a file, a mount point, or holds something.
    """
    if out.exists() and not out.is_dir():
        raise DataError(f"--out {out} is a file; name a folder")
    if os.path.ismount(out):
        raise DataError(f"--out {out} is a mount point; name a new folder in it")
    with one_line_write_errors(out):
        names = sorted(path.name for path in out.iterdir()) if out.exists() else []
    if names:
        raise DataError(f"--out {out} is not empty (it holds {names[0]}); name a new or empty folder")


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise DataError(f"{folder} is being written by another process; wait for it or end it") from error
        yield
    finally:
        os.close(descriptor)


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()
