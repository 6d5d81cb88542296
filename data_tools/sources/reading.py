"""Open local and remote files, decompress them, and report what is wrong with them in one line."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, cast

import fsspec
import pyarrow as pa

from data_tools.errors import DataError
from data_tools.storage.files import is_remote

READ_BYTES = 1 << 20
# By suffix, the name that Arrow gives to the decompressor.
_COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}


def compression_of(path: str) -> str | None:
    """Return Arrow's name of the compression that the suffix of a path stands for, or None."""
    return _COMPRESSIONS.get(os.path.splitext(path)[1])


@contextmanager
def open_file(path: str) -> Iterator[BinaryIO]:
    """Open a file, local or at a URL, for reading bytes and seeking.

    Raises:
        DataError: the file cannot be opened, or reading it fails in the block.
    """
    with one_line_read_errors(path):
        if is_remote(path):
            with fsspec.open(path, "rb") as remote:
                # fsspec's own files read lines slowly, and only whole ones.
                yield io.BufferedReader(cast(io.RawIOBase, remote), READ_BYTES)
        else:
            with open(path, "rb", buffering=READ_BYTES) as local:
                yield local


@contextmanager
def open_decompressed(path: str) -> Iterator[BinaryIO]:
    """Open a file for reading bytes, and decompress ``.gz`` and ``.zst`` in constant memory.

    Raises:
        DataError: the file cannot be opened, or reading it in the block shows that it is damaged or cut short.
    """
    with open_file(path) as file, one_line_read_errors(path):
        compression = compression_of(path)
        if compression is None:
            yield file
        else:
            with pa.input_stream(pa.PythonFile(file), compression=compression, buffer_size=READ_BYTES) as stream:
                yield cast(BinaryIO, io.BufferedReader(stream, READ_BYTES))  # Arrow's stream has no readline


@contextmanager
def one_line_read_errors(path: str | Path) -> Iterator[None]:
    """Turn a failure to read in the block into a DataError of one line that names the file and the reason."""
    try:
        yield
    except (OSError, pa.ArrowException) as error:
        reason = getattr(error, "strerror", None) or (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(f"cannot read {getattr(error, 'filename', None) or path}: {reason}") from error
    except Exception as error:
        # The errors of clients of remote storage have no common base class.
        if isinstance(error, DataError) or not is_remote(str(path)):
            raise
        raise DataError(f"cannot read {path}: {describe_error(error)}") from error


def describe_error(error: Exception) -> str:
    """Return an error's type and the first line of its message."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def decode_utf8(content: bytes, path: str, offset: int) -> str:
    """Decode a document or a line that begins at ``offset`` bytes in the decompressed file.

    Raises:
        DataError: a byte is not UTF-8. The message names the file and the byte's offset.
    """
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: byte {offset + error.start} ({content[error.start]:#04x}) is not valid UTF-8 "
            f"({error.reason}); convert the file to UTF-8"
        ) from error
