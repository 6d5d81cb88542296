"""Compute hashes of JSON objects, recognize URLs, and check that paths are writable."""

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

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


def sha256_of_json(value: dict[str, Any]) -> str:
    """Return the SHA-256 of a JSON object as 64 hexadecimal digits. The hash depends on the order of the keys."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def dotted_keys(content: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted key, value) for each value in nested JSON objects, such as ``("optimizer.eps", 1e-8)``.

    Each key begins with ``prefix``.
    """
    for key, value in content.items():
        if isinstance(value, dict):
            yield from dotted_keys(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
