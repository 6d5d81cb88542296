"""Create output folders. If the command fails before it writes a file, remove the created folders."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from data_tools.storage.atomic import fsync_folder


def create_folder(path: Path) -> list[Path]:
    """Create a folder and its missing parents durably. Returns the created folders, the innermost first.

    Raises OSError if the folder cannot be created.
    """
    created = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in created:
        fsync_folder(folder.parent)
    return created


@contextmanager
def removed_if_unused(created: Sequence[Path]) -> Iterator[None]:
    """Run the block. If the block fails, remove those of the ``created`` folders that are empty."""
    try:
        yield
    except BaseException:
        with suppress(OSError):  # not empty
            for folder in created:
                folder.rmdir()
        raise
