"""What the sources that read files share: finding files, opening them, naming their faults."""

from __future__ import annotations

import glob
import hashlib
import io
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import pyarrow as pa

from data_tools.errors import DataError

# Arrow's own names of the decompressors.
_COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
_READ_BYTES = 1 << 20


@dataclass(frozen=True)
class FileList:
    """Input files in the order in which they are read.

    Attributes:
        inputs: as the user gave them.
        files: path and size in bytes of each file.
    """

    inputs: tuple[str, ...]
    files: tuple[tuple[Path, int], ...]

    def options(self) -> dict[str, Any]:
        """The inputs, and enough about the files to notice that one came, went, or changed its size."""
        return {"inputs": list(self.inputs), **describe_files(self.files)}

    def paths(self) -> Iterator[Path]:
        """The files' paths in reading order."""
        return (path for path, _ in self.files)


def describe_files(files: Sequence[tuple[Path, int]]) -> dict[str, Any]:
    """Number, total bytes, and a SHA-256 over names and sizes, as JSON values."""
    listing = hashlib.sha256()
    for path, size in files:
        listing.update(os.fsencode(path.as_posix()) + b"\0%d\n" % size)
    return {
        "files": len(files),
        "bytes": sum(size for _, size in files),
        "listing_sha256": listing.hexdigest(),
    }


def list_files(inputs: Sequence[str], suffixes: tuple[str, ...]) -> FileList:
    """Resolve files, folders and glob patterns, in the order given and sorted within each.

    A folder stands for the files below it whose names end in one of ``suffixes`` (all, if there are none),
    hidden ones left out.

    Raises:
        DataError: an input does not exist, holds no such file, or names a file a second time.
    """
    with one_line_read_errors():
        paths = [path for text in inputs for path in _expand(text, suffixes)]
    seen: set[Path] = set()
    for path in paths:
        if path in seen:
            raise DataError(f"--input names {path} twice")
        seen.add(path)
    with one_line_read_errors():
        return FileList(tuple(inputs), tuple((path, path.stat().st_size) for path in paths))


def _expand(text: str, suffixes: tuple[str, ...]) -> list[Path]:
    if os.path.isfile(text):
        return [Path(text)]
    if os.path.isdir(text):
        if files := sorted(_files_below(Path(text), suffixes)):
            return files
        raise DataError(f"--input {text} holds no file{_that_ends_in(suffixes)}")
    if glob.has_magic(text):
        if files := sorted(Path(match) for match in glob.glob(text, recursive=True) if os.path.isfile(match)):
            return files
        raise DataError(f"--input {text} matches no file")
    raise DataError(f"--input {text} does not exist")


def _files_below(folder: Path, suffixes: tuple[str, ...]) -> Iterator[Path]:
    for parent, folders, names in os.walk(folder, onerror=raise_error):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            if not name.startswith(".") and (not suffixes or name.endswith(suffixes)):
                yield Path(parent, name)


def raise_error(error: OSError) -> None:
    """For ``os.walk``, which otherwise leaves out what it may not read."""
    raise error


def _that_ends_in(suffixes: tuple[str, ...]) -> str:
    return f" that ends in {', '.join(suffixes)}" if suffixes else ""


@contextmanager
def open_decompressed(path: Path) -> Iterator[BinaryIO]:
    """Open a file for reading bytes; ``.gz`` and ``.zst`` are decompressed on the way, in constant memory.

    Raises:
        DataError: the file cannot be opened or, also while it is read, is damaged or cut short.
    """
    with one_line_read_errors(path):
        compression = _COMPRESSIONS.get(path.suffix)
        if compression is None:
            with open(path, "rb", buffering=_READ_BYTES) as file:
                yield file
        else:
            with pa.input_stream(str(path), compression=compression, buffer_size=_READ_BYTES) as stream:
                # Arrow's stream gives out bytes; a line at a time is the standard library's part.
                yield cast(BinaryIO, io.BufferedReader(stream, _READ_BYTES))


@contextmanager
def one_line_read_errors(path: Path | None = None) -> Iterator[None]:
    """Turn an ``OSError`` or an Arrow error of the block into one line that names the file.

    Raises:
        DataError: with the path and the reason.
    """
    try:
        yield
    except (OSError, pa.ArrowException) as error:
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise DataError(f"cannot read {path or getattr(error, 'filename', None)}: {reason}") from error


def decode_utf8(content: bytes, path: Path, offset: int) -> str:
    """Decode strictly.

    Args:
        content: bytes of a document or a line.
        path: where they stood, for the message.
        offset: of their first byte in the (decompressed) file.

    Raises:
        DataError: names the file and the offset of the first byte that is not UTF-8.
    """
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: byte {offset + error.start} ({content[error.start]:#04x}) is not valid UTF-8 "
            f"({error.reason}); convert the file to UTF-8"
        ) from error
