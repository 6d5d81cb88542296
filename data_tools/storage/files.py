"""Durable writes: a file is either absent, or whole and on the disk under its name."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from data_tools.errors import DataError

TEMPORARY_SUFFIX = ".partial"
_HASH_CHUNK_BYTES = 8 << 20  # each chunk gives the interpreter away twice: few, where other threads compute


def is_remote(path: str) -> bool:
    """Whether a path is a URL, as ``s3://bucket/folder``."""
    return "://" in path


def temporary_path(path: Path) -> Path:
    """The name beside ``path`` under which it is written until it is whole."""
    return path.with_name(path.name + TEMPORARY_SUFFIX)


def sha256_of_file(path: Path, advance: Callable[[int], None] = lambda done_bytes: None) -> str:
    """SHA-256 of a file's bytes as 64 hexadecimal digits, in constant memory.

    Args:
        path: of the file.
        advance: told every few megabytes of the bytes read since the last time.
    """
    digest = hashlib.sha256()
    chunk = memoryview(bytearray(_HASH_CHUNK_BYTES))
    with open(path, "rb", buffering=0) as file:
        while n := file.readinto(chunk):
            digest.update(chunk[:n])
            advance(n)
    return digest.hexdigest()


def sha256_of_json(value: dict[str, Any]) -> str:
    """SHA-256 of a JSON object in the order of its keys, as 64 hexadecimal digits."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def fsync_file(path: Path) -> None:
    """Make the contents of a file that another library wrote survive a power cut."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def fsync_folder(path: Path) -> None:
    """Make the names in a folder (creations, renames, removals) survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def publish(temporary: Path, path: Path) -> None:
    """Give a finished and fsynced temporary file its name, durably and atomically."""
    os.replace(temporary, path)
    fsync_folder(path.parent)


def write_bytes_durably(path: Path, content: bytes) -> None:
    """Write a whole file through a temporary name; a failure leaves neither half a file nor the temporary.

    Raises:
        OSError: the disk is full, the folder is missing or read-only, ...
    """
    temporary = temporary_path(path)
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        publish(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_json_durably(path: Path, value: Any) -> None:
    """Write a value as indented JSON with a final newline, through ``write_bytes_durably``.

    The bytes depend on the value only: keys keep their order, text is ASCII.
    """
    text = json.dumps(value, indent=2, allow_nan=False) + "\n"
    write_bytes_durably(path, text.encode("ascii"))


@contextmanager
def one_line_write_errors(path: Path) -> Iterator[None]:
    """Turn an ``OSError`` of the block (disk full, no permission, ...) into one line that names ``path``.

    Raises:
        DataError: with the path and the reason.
    """
    try:
        yield
    except OSError as error:
        raise DataError(f"cannot write {path}: {error.strerror or error}") from error
