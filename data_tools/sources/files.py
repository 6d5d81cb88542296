"""What the sources that read files share: finding files, opening them, cutting them, naming their faults.

A path is local, or a URL of any protocol that fsspec knows (``s3://``, ``gs://``, ``hf://``, ...).
"""

from __future__ import annotations

import glob
import hashlib
import io
import itertools
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import fsspec
import pyarrow as pa

from data_tools.errors import DataError
from data_tools.sources.slices import Slice
from data_tools.storage.files import is_remote

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
    files: tuple[tuple[str, int], ...]

    def options(self) -> dict[str, Any]:
        """The inputs, and enough about the files to notice that one came, went, or changed its size."""
        return {"inputs": list(self.inputs), **describe_files(self.files)}

    def text_bytes(self) -> int:
        """About how many bytes of text there are."""
        return sum(_text_bytes(path, size) for path, size in self.files)

    def cut(self, slice_bytes: int) -> list[Slice]:
        """Ranges of bytes, none longer than ``slice_bytes``; a compressed file cannot be cut."""
        slices = []
        for path, size in self.files:
            parts = -(-size // slice_bytes) if compression_of(path) is None else 1
            bounds = [size * part // parts for part in range(parts + 1)] if parts else [0, 0]
            for start, stop in itertools.pairwise(bounds):
                slices.append(Slice(path, start, stop, _text_bytes(path, stop - start)))
        return slices


def _text_bytes(path: str, size: int) -> int:
    """Of ``size`` bytes of a file; compressed text is about four times as long."""
    return size if compression_of(path) is None else 4 * size


def group_files(files: Sequence[tuple[str, int]], slice_bytes: int) -> list[Slice]:
    """Runs of whole files, each up to about ``slice_bytes``; ranges count files."""
    slices: list[Slice] = []
    start, size = 0, 0
    for index, (_, file_bytes) in enumerate(files):
        if size and size + file_bytes > slice_bytes:
            slices.append(Slice(files[start][0], start, index, size))
            start, size = index, 0
        size += file_bytes
    return [*slices, Slice(files[start][0], start, len(files), size)] if files else slices


def describe_files(files: Sequence[tuple[str, int]]) -> dict[str, Any]:
    """Number, total bytes, and a SHA-256 over names and sizes, as JSON values."""
    listing = hashlib.sha256()
    for path, size in files:
        listing.update(os.fsencode(path) + b"\0%d\n" % size)
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
    files = [file for text in inputs for file in _expand(text, suffixes)]
    seen: set[str] = set()
    for path, _ in files:
        if path in seen:
            raise DataError(f"--input names {path} twice")
        seen.add(path)
    return FileList(tuple(inputs), tuple(files))


def _expand(text: str, suffixes: tuple[str, ...]) -> list[tuple[str, int]]:
    with one_line_read_errors(text):
        find = _find_remote if is_remote(text) else _find_local
        return find(text, suffixes)


def _find_local(text: str, suffixes: tuple[str, ...]) -> list[tuple[str, int]]:
    if os.path.isfile(text):
        paths = [Path(text)]
    elif os.path.isdir(text):
        paths = sorted(_files_below(Path(text), suffixes))
        _expect_some(paths, f"--input {text} holds no file{_that_ends_in(suffixes)}")
    elif glob.has_magic(text):
        paths = sorted(Path(match) for match in glob.glob(text, recursive=True) if os.path.isfile(match))
        _expect_some(paths, f"--input {text} matches no file")
    else:
        raise DataError(f"--input {text} does not exist")
    return [(path.as_posix(), path.stat().st_size) for path in paths]


def _find_remote(text: str, suffixes: tuple[str, ...]) -> list[tuple[str, int]]:
    file_system, root = fsspec.core.url_to_fs(text)
    file_system.invalidate_cache()
    if glob.has_magic(root):
        matches = (path for path in file_system.glob(root) if file_system.isfile(path))
        paths = sorted(path for path in matches if _is_visible(path, root))
        _expect_some(paths, f"--input {text} matches no file")
    elif file_system.isfile(root):
        paths = [root]
    else:
        names = (path for path in file_system.find(root) if _is_visible(path, root))
        paths = sorted(path for path in names if not suffixes or path.endswith(suffixes))
        _expect_some(paths, f"--input {text} does not exist, or holds no file{_that_ends_in(suffixes)}")
    return [(file_system.unstrip_protocol(path), int(file_system.size(path))) for path in paths]


def _is_visible(path: str, root: str) -> bool:
    """Whether neither the file nor a folder on the way from ``root``, a folder or a pattern, is hidden."""
    common = os.path.commonprefix((path, root)).rpartition("/")[0]
    return "/." not in path[len(common) :]


def _expect_some(paths: Sequence[object], problem: str) -> None:
    if not paths:
        raise DataError(problem)


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


def compression_of(path: str) -> str | None:
    """Arrow's name of what a file is compressed with, by its name; None: it is not."""
    return _COMPRESSIONS.get(os.path.splitext(path)[1])


@contextmanager
def open_file(path: str) -> Iterator[BinaryIO]:
    """Open a local or remote file for reading bytes; it can seek.

    Raises:
        DataError: the file cannot be opened or, also while it is read, fails.
    """
    with one_line_read_errors(path):
        if is_remote(path):
            with fsspec.open(path, "rb") as remote:
                # fsspec's own files read lines slowly, and only whole ones.
                yield io.BufferedReader(cast(io.RawIOBase, remote), _READ_BYTES)
        else:
            with open(path, "rb", buffering=_READ_BYTES) as local:
                yield local


@contextmanager
def open_decompressed(path: str) -> Iterator[BinaryIO]:
    """Open a file for reading bytes; ``.gz`` and ``.zst`` are decompressed on the way, in constant memory.

    Raises:
        DataError: the file cannot be opened or, also while it is read, is damaged or cut short.
    """
    with open_file(path) as file, one_line_read_errors(path):
        compression = compression_of(path)
        if compression is None:
            yield file
        else:
            with pa.input_stream(pa.PythonFile(file), compression=compression, buffer_size=_READ_BYTES) as stream:
                # Arrow's stream gives out bytes; a line at a time is the standard library's part.
                yield cast(BinaryIO, io.BufferedReader(stream, _READ_BYTES))


@contextmanager
def one_line_read_errors(path: str | Path) -> Iterator[None]:
    """Turn a failure to read of the block into one line that names the file.

    Raises:
        DataError: with the path and the reason.
    """
    try:
        yield
    except (OSError, pa.ArrowException) as error:
        reason = getattr(error, "strerror", None) or (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(f"cannot read {getattr(error, 'filename', None) or path}: {reason}") from error
    except Exception as error:
        # Clients of remote storage raise errors of their own, without a common base.
        if isinstance(error, DataError) or not is_remote(str(path)):
            raise
        reason = (str(error).splitlines() or [""])[0]
        raise DataError(f"cannot read {path}: {type(error).__name__}: {reason}") from error


def decode_utf8(content: bytes, path: str, offset: int) -> str:
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
