"""Find, divide, open and decompress the files that sources read.

A path is a local path, or a URL that fsspec supports (such as ``s3://``, ``gs://`` or ``hf://``).
"""

import glob
import gzip
import hashlib
import io
import itertools
import os
import stat
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import pyarrow as pa

from data_tools.errors import DataError, describe_broken_link, describe_error
from data_tools.formatting import count_of
from data_tools.sources.rows import BadRowError
from data_tools.storage.content import (
    LARGEST_POINTER_BYTES,
    begins_as,
    describe_content,
    require_fetched,
    require_no_pointer,
)
from data_tools.storage.files import is_remote
from data_tools.storage.remote import find_file_system, open_url, wait_for_answer

READ_BYTES = 1 << 20
# Suffix -> kind of content in ``describe_content``.
_COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
_KINDS = {**_COMPRESSIONS, ".parquet": "parquet"}
_COMPRESSION_FACTOR = 4  # text is about four times as long as the compressed file

_MAX_ENDINGS = 5  # in a message
_NOT_A_FILE = "is a pipe or a device; write the documents to a file first, because a file is read several times"

FileSizes = Sequence[tuple[str, int]]


@dataclass(frozen=True)
class Slice:
    """A range of a source that can be read without the rest of the source.

    Attributes:
        path: the path of the file. For several files, the path of the first one.
        start, stop: the range from ``start`` to ``stop - 1``, in bytes, row groups, rows or files.
        text_bytes: the approximate bytes of text in the range, or None if unknown.
    """

    path: str
    start: int
    stop: int
    text_bytes: int | None = None

    def __str__(self) -> str:
        return f"{self.path}[{self.start}:{self.stop}]"


class FileSource:
    """The base class for sources that read files.

    ``files`` are the path and the size in bytes of each file, in the order of reading.
    """

    def __init__(self, inputs: Sequence[str], suffixes: tuple[str, ...], **settings: str | None) -> None:
        """Find the files. ``settings`` are all other options that the documents depend on."""
        self._inputs = inputs
        self._settings = settings
        self._suffixes = suffixes
        self.files = find_files(inputs, suffixes)

    def options(self) -> dict[str, Any]:
        return {"inputs": list(self._inputs), **describe_files(self.files), **self._settings}

    def notices(self) -> list[str]:
        """Return at most one message: how many files of input folders are skipped because of their suffix."""
        others = find_other_files(self._inputs, self._suffixes)
        return [describe_skipped_files(others)] if others else []

    def text_bytes(self) -> int:
        return sum(_estimate_text_bytes(path, size) for path, size in self.files)

    def whole_texts(self, count: int, above_bytes: int) -> list[int]:
        texts = sorted(((_estimate_text_bytes(path, size), path) for path, size in self.files), reverse=True)
        large = itertools.takewhile(lambda text: text[0] > above_bytes, texts)
        return list(itertools.islice((size for size, path in large if self._is_read_whole(path)), count))

    def _is_read_whole(self, path: str) -> bool:
        """Return whether the complete text of a file is held in memory."""
        return False

    def slices(self, slice_bytes: int) -> list[Slice]:
        """Divide the files into ranges of at most ``slice_bytes`` bytes. A compressed file is not divided."""
        slices = []
        for path, size in self.files:
            count = max(1, -(-size // slice_bytes)) if compression_of(path) is None else 1
            bounds = [size * index // count for index in range(count + 1)]
            for start, stop in itertools.pairwise(bounds):
                slices.append(Slice(path, start, stop, _estimate_text_bytes(path, stop - start)))
        return slices


def group_files(files: FileSizes, slice_bytes: int) -> list[Slice]:
    """Group consecutive files into slices of at most ``slice_bytes`` bytes.

    A file that is larger than ``slice_bytes`` gets its own slice.
    """
    groups = group_sizes([size for _, size in files], slice_bytes)
    return [Slice(files[start][0], start, stop, size) for start, stop, size in groups]


def group_sizes(sizes: Sequence[int], limit: int) -> Iterator[tuple[int, int, int]]:
    """Group consecutive sizes so that the sum of each group is at most ``limit``.

    A size that is larger than ``limit`` gets its own group.

    Yields (start, stop, total) for each group ``sizes[start:stop]`` with the sum ``total``.
    """
    start, total = 0, 0
    for index, size in enumerate(sizes):
        if total and total + size > limit:
            yield start, index, total
            start, total = index, 0
        total += size
    if sizes:
        yield start, len(sizes), total


def describe_files(files: FileSizes) -> dict[str, Any]:
    """Return the number of files, their total size, and a SHA-256 of all names and sizes, as JSON values."""
    listing = hashlib.sha256()
    for path, size in files:
        listing.update(os.fsencode(path) + b"\0%d\n" % size)
    return {"files": len(files), "bytes": sum(size for _, size in files), "listing_sha256": listing.hexdigest()}


def find_files(inputs: Sequence[str], suffixes: tuple[str, ...]) -> FileSizes:
    """Return the path and the size in bytes of each input file. The files of each input are sorted by path.

    Args:
        inputs: files, folders and glob patterns. A folder stands for all files in it and in its subfolders. Hidden
            files and hidden subfolders are skipped.
        suffixes: the suffixes of files to find in folders. An empty tuple allows all suffixes.

    Raises:
        DataError: an input contains no file, or two inputs contain the same file.
    """
    files: dict[str, int] = {}
    for text in inputs:
        with one_line_source_errors(text):
            found = _find_remote(text, suffixes) if is_remote(text) else _find_local(text, suffixes)
        if not found:
            problem = f"holds no file that ends in {', '.join(suffixes)}" if suffixes else "holds no file"
            if glob.has_magic(text) and not os.path.isdir(text):
                problem = "matches no file"
            elif is_remote(text):
                problem = f"does not exist, or {problem}"
            elif text != "-" and not os.path.exists(text):
                problem = describe_broken_link(text) or "does not exist"
            elif not os.path.isdir(text):
                problem = _NOT_A_FILE
            raise DataError(f"--input {text} {problem}")
        for path, size in found:
            if path in files:
                raise DataError(f"--input names {path} twice")
            files[path] = size
    return tuple(files.items())


def find_other_files(inputs: Sequence[str], suffixes: tuple[str, ...]) -> list[str]:
    """Return the files in input folders that ``find_files`` skips because of their suffix."""
    found: set[str] = set()
    everything: set[str] = set()
    for text in inputs if suffixes else ():
        list_files = _list_remote if is_remote(text) else _list_local
        with one_line_source_errors(text):
            found.update(list_files(text, suffixes))
            everything.update(list_files(text, ()))
    return sorted(everything - found)


def describe_skipped_files(paths: Sequence[str]) -> str:
    """Return a message about skipped files, such as ``3 files with other endings skipped: .md (2), .py (1)``."""
    endings = Counter(os.path.splitext(path)[1] or "without an ending" for path in paths)
    most_common = sorted(endings.items(), key=lambda item: (-item[1], item[0]))[:_MAX_ENDINGS]
    named = [f"{ending} ({count:,})" for ending, count in most_common]
    more = len(endings) - len(named)
    return f"{count_of(len(paths), 'file')} with other endings skipped: {', '.join(named)}" + (
        f", {more:,} more" if more else ""
    )


def _find_local(text: str, suffixes: tuple[str, ...]) -> FileSizes:
    files = [(path, os.stat(path)) for path in _list_local(text, suffixes)]
    for path, status in files:
        if not stat.S_ISREG(status.st_mode):
            raise DataError(f"--input {path} {_NOT_A_FILE}")
    return [(path, status.st_size) for path, status in files]


def _list_local(text: str, suffixes: tuple[str, ...]) -> list[str]:
    if os.path.isdir(text):
        paths = walk_files(Path(text), suffixes)
    else:
        # The input may be a file whose name contains *, ? or [.
        matches = [text] if os.path.isfile(text) else glob.glob(text, recursive=True)
        paths = (Path(match) for match in matches if os.path.isfile(match))
    return [path.as_posix() for path in sorted(paths)]


def _find_remote(text: str, suffixes: tuple[str, ...]) -> FileSizes:
    file_system, _ = find_file_system(text)
    return [(path, int(file_system.size(path))) for path in _list_remote(text, suffixes)]


def _list_remote(text: str, suffixes: tuple[str, ...]) -> list[str]:
    file_system, root = find_file_system(text)
    file_system.invalidate_cache()
    # This is the first request. If the server never answers, an error names it.
    is_file = wait_for_answer(text, lambda: file_system.isfile(root))
    if glob.has_magic(root):
        matches = (path for path in file_system.glob(root) if file_system.isfile(path))
        paths = sorted(path for path in matches if _is_visible(path, root))
    elif is_file:
        paths = [root]
    else:
        names = (path for path in file_system.find(root) if _is_visible(path, root))
        paths = sorted(path for path in names if not suffixes or path.endswith(suffixes))
    return [file_system.unstrip_protocol(path) for path in paths]


def walk_files(
    folder: Path, suffixes: tuple[str, ...], skipped_folders: frozenset[str] = frozenset()
) -> Iterator[Path]:
    """Yield the files in a folder and its subfolders that have one of the suffixes.

    If ``suffixes`` is empty, yield all files. Hidden files, hidden folders, and folders with a name in
    ``skipped_folders`` are skipped. Links to folders are followed, but each folder is visited only once.
    """
    visited: set[str] = set()

    def raise_error(error: OSError) -> None:
        raise error

    # Without onerror, os.walk skips the folders that it cannot read.
    for parent, folders, names in os.walk(folder, onerror=raise_error, followlinks=True):
        if (real := os.path.realpath(parent)) in visited:
            folders.clear()
            continue
        visited.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name not in skipped_folders)
        for name in names:
            if not name.startswith(".") and (not suffixes or name.endswith(suffixes)):
                yield Path(parent, name)


def _is_visible(path: str, root: str) -> bool:
    """Return whether a path has no hidden names after ``root``, which is a folder or a pattern."""
    common = os.path.commonprefix((path, root)).rpartition("/")[0]
    return "/." not in path[len(common) :]


def _estimate_text_bytes(path: str, size: int) -> int:
    return size if compression_of(path) is None else _COMPRESSION_FACTOR * size


def compression_of(path: str) -> str | None:
    """Return the compression of a file according to its suffix: ``gzip``, ``zstd`` or None."""
    return _COMPRESSIONS.get(os.path.splitext(path)[1])


@contextmanager
def open_file(path: str) -> Iterator[BinaryIO]:
    """Return a context manager that opens a file at a local path or a URL for ``read`` and ``seek``.

    Read errors in the ``with`` block become a DataError.
    """
    with one_line_source_errors(path):
        if is_remote(path):
            with open_url(path) as remote:
                # File objects of fsspec read lines slowly and cannot limit the length of a line.
                buffered = io.BufferedReader(cast(io.RawIOBase, remote), READ_BYTES)
                if (getattr(remote, "size", None) or LARGEST_POINTER_BYTES) < LARGEST_POINTER_BYTES:
                    require_no_pointer(buffered.peek(LARGEST_POINTER_BYTES), path)
                yield buffered
        else:
            require_fetched(path)
            with open(path, "rb", buffering=READ_BYTES) as local:
                yield local


@contextmanager
def open_decompressed(path: str) -> Iterator[BinaryIO]:
    """Return a context manager that opens a file for reading bytes. ``.gz`` and ``.zst`` files are decompressed.

    Some file systems add zeros to the end of a file. In ``.gz`` files, such zeros are ignored.
    """
    compression = compression_of(path)
    with open_file(path) as file:
        if compression is None:
            yield file
        elif not cast(io.BufferedReader, file).peek(1):
            raise DataError(f"{path} is empty (0 bytes), so it is not compressed by {compression}; make it again")
        elif compression == "gzip" and _ends_in_zero(file):
            # Python's decompressor ignores zeros after the end, but it is half as fast as Arrow's.
            with gzip.GzipFile(fileobj=file) as unzipped:
                yield cast(BinaryIO, io.BufferedReader(unzipped, READ_BYTES))
        else:
            with pa.input_stream(pa.PythonFile(file), compression=compression, buffer_size=READ_BYTES) as stream:
                yield cast(BinaryIO, io.BufferedReader(stream, READ_BYTES))  # Arrow's stream has no readline


def _ends_in_zero(file: BinaryIO) -> bool:
    file.seek(-1, os.SEEK_END)
    last = file.read(1)
    file.seek(0)
    return last == b"\0"


@contextmanager
def one_line_source_errors(path: str | Path) -> Iterator[None]:
    """Return a context manager that converts errors of local, compressed and remote files to a DataError."""
    try:
        yield
    except (OSError, EOFError, zlib.error, pa.ArrowException) as error:
        name = getattr(error, "filename", None) or path
        reason = getattr(error, "strerror", None) or explain_content(str(path), str(error)) or type(error).__name__
        if link := describe_broken_link(name):
            reason = f"it {link}"
        raise DataError(f"cannot read {name}: {reason}") from error
    except Exception as error:
        # The errors of clients of remote storage have no common base class.
        if isinstance(error, DataError) or not is_remote(str(path)):
            raise
        reason = describe_error(error)
        if "range requests" in reason:  # the library fsspec then names an option that users cannot set
            reason = "the server sends only whole files; download the file first"
        raise DataError(f"cannot read {path}: {reason}") from error


def explain_content(path: str, reason: str) -> str:
    """Return the reason why a file cannot be read, for an error message.

    If the first bytes do not fit the suffix, the result describes the content. Otherwise, the result is the first line
    of ``reason``.
    """
    kind = _KINDS.get(os.path.splitext(path)[1])
    if found := describe_content(path, kind):
        return f"it {found}"
    if kind is not None and kind in _COMPRESSIONS.values() and not begins_as(path, kind):
        return f"it is not compressed by {kind}, though its name says so; rename it"
    first_line = (reason.splitlines() or [""])[0]
    return first_line if kind is None else f"{first_line}; if it is damaged, copy or download it again"


def decode_utf8(content: bytes, path: str, offset: int) -> str:
    """Decode a document or a line of a file. Raise BadRowError if it is not valid UTF-8.

    ``offset`` is the number of bytes before ``content`` in the decompressed file.
    """
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        if found := describe_content(path, compression_of(path), "html"):
            raise BadRowError(f"{path} {found}") from error
        cure = "convert the file to UTF-8, or leave it out if it is not text"
        if error.reason == "unexpected end of data":
            cure = f"if the file was cut off, copy or download it again; otherwise, {cure}"
        byte = f"byte {offset + error.start} ({content[error.start]:#04x})"
        raise BadRowError(f"{path}: {byte} is not valid UTF-8 ({error.reason}); {cure}") from error
