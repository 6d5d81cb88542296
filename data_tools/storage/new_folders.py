"""Create output folders. Remove them again if a command fails before it has written a file."""

import errno
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from data_tools.errors import describe_broken_link
from data_tools.storage.atomic import fsync_folder


def create_folder(path: Path) -> list[Path]:
    """Create a folder and its missing parents durably. Return the created folders, the innermost first.

    Raises:
        OSError: the folder cannot be created, for example because a parent is a link to a disk that is not mounted.
    """
    created = [folder for folder in (path, *path.parents) if not folder.exists()]
    for folder in created:
        if reason := describe_broken_link(folder):  # mkdir would say that the file exists
            raise FileNotFoundError(errno.ENOENT, f"{folder} {reason}", str(folder))
    path.mkdir(parents=True, exist_ok=True)
    for folder in created:
        fsync_folder(folder.parent)
    return created


@contextmanager
def removed_if_unused(created: Sequence[Path]) -> Iterator[None]:
    """Return a context manager. If its ``with`` block raises an error, it removes the empty folders in ``created``."""
    try:
        yield
    except BaseException:
        with suppress(OSError):  # not empty
            for folder in created:
                folder.rmdir()
        raise
