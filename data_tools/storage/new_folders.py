"""Create output folders. Remove them again if a command fails before it has written a file."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from data_tools.storage.atomic import fsync_folder


def create_folder(path: Path) -> list[Path]:
    """Create a folder and its missing parents durably. Return the created folders, the innermost first."""
    created = [folder for folder in (path, *path.parents) if not folder.exists()]
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
