"""Access files at URLs with fsspec.

The functions import fsspec, because this takes a tenth of a second and local files do not need it.
"""

from contextlib import AbstractContextManager
from typing import Any


def find_file_system(url: str, **options: Any) -> tuple[Any, str]:
    """Return fsspec's file system for a URL, and the path in this file system. ``options`` are fsspec's options."""
    import fsspec

    file_system, path = fsspec.core.url_to_fs(url, **options)
    return file_system, path


def find_folder(url: str, **options: Any) -> Any:
    """Return a file system of fsspec whose paths are relative to the folder at a URL."""
    from fsspec.implementations.dirfs import DirFileSystem

    file_system, path = find_file_system(url, **options)
    return DirFileSystem(path, file_system)


def open_url(url: str) -> AbstractContextManager[Any]:
    """Return a context manager that opens the file at a URL for reading bytes."""
    import fsspec

    opened: AbstractContextManager[Any] = fsspec.open(url, "rb")
    return opened
