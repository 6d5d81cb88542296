"""Recognize URLs, and check that paths are writable."""

import os
from pathlib import Path

from data_tools.errors import DataError


def is_remote(path: str) -> bool:
    """Return whether a path is a URL such as ``s3://bucket/folder``."""
    return "://" in path


def is_writable(path: Path) -> bool:
    """Return whether a file or a folder can be created at a path. Its parents may be missing. Nothing is created."""
    existing = path.absolute()
    while not existing.exists():
        existing = existing.parent
    return os.access(existing, os.W_OK) and (existing == path.absolute() or existing.is_dir())


def require_writable(path: Path, option: str) -> None:
    """Raise DataError if ``path`` is a file, or if a folder at this path cannot be created or written.

    Call this function before slow work.

    ``option`` is the command-line option that contains ``path``. The message begins with ``option``.
    """
    if path.is_file():
        raise DataError(f"{option}: {path} is a file; name a folder")
    if not is_writable(path):
        raise DataError(f"{option}: cannot write {path}; name a place that you may write to")
