"""Recognize the kind of a file by its first bytes, to explain why the file cannot be read."""

import os
from pathlib import Path

from data_tools.errors import DataError
from data_tools.storage.files import is_remote

_HEAD_BYTES = 512
_SHORTEST_UTF16 = 4  # bytes
# Among letters that are not ASCII, about one in seven characters of two bytes is a space, a comma or a full stop.
_LARGEST_BYTES_PER_ZERO = 20
_FEWEST_BYTES = 200
# The specification of git-lfs says that a pointer is smaller than this.
LARGEST_POINTER_BYTES = 1024
_LONGEST_ARROW_SCHEMA = 1 << 24  # bytes; other files that begin like Arrow usually have a larger number here
_COMPRESSIONS = ("gzip", "zstd", "xz", "bzip2", "lz4", "compress")
_TAR_MAGIC, _TAR_MAGIC_OFFSET = b"ustar", 257
_COMPRESSED_TAR_SUFFIXES = (".tgz", ".taz", ".tbz", ".tbz2", ".tz2", ".txz", ".tzst")
_DECODED_KINDS = ("tar", "zeros", "utf-16")
_POINTER_BEGINNING = b"version https://git-lfs.github.com/"
_POINTER = "is a git-lfs pointer, not the file itself; fetch the file with: git lfs pull"
#: Kind -> the first bytes of a file, and the text of the error message.
_KINDS: dict[str, tuple[tuple[bytes, ...], str]] = {
    "pointer": ((_POINTER_BEGINNING,), _POINTER),
    "gzip": ((b"\x1f\x8b",), "is compressed by gzip; decompress it, or let the name of a text or JSON file end in .gz"),
    "zstd": (
        (b"\x28\xb5\x2f\xfd",),
        "is compressed by zstd; decompress it, or let the name of a text or JSON file end in .zst",
    ),
    "xz": ((b"\xfd7zXZ\x00",), "is compressed by xz; decompress it"),
    "bzip2": ((b"BZh",), "is compressed by bzip2; decompress it"),
    "lz4": ((b"\x04\x22\x4d\x18",), "is compressed by lz4; decompress it"),
    "compress": ((b"\x1f\x9d",), "is compressed by compress; decompress it"),
    "7z": ((b"7z\xbc\xaf\x27\x1c",), "is a 7z archive; extract the files in it"),
    "rar": ((b"Rar!\x1a\x07",), "is a rar archive; extract the files in it"),
    "zip": ((b"PK\x03\x04",), "is a zip archive; extract the files in it"),
    "pdf": ((b"%PDF-",), "is a PDF; extract its text into a file"),
    "parquet": ((b"PAR1",), "is a Parquet file; --source parquet reads it"),
    "arrow": (
        (b"ARROW1", b"\xff\xff\xff\xff"),  # a file, and the continuation marker of a stream
        "is an Arrow file; give its folder to --source hf",
    ),
    "npy": ((b"\x93NUMPY",), "is an array of numpy"),
    "html": (
        (b"<!doctype html", b"<html"),  # in lower case, after blanks
        "is an HTML page, probably an error page that was saved in place of the file; download it again",
    ),
    # Kinds that have no characteristic beginning.
    "empty": ((), "is empty (0 bytes); copy or download it again"),
    "zeros": ((), "begins with zeros only, as after an interrupted copy; copy or download it again"),
    "tar": ((), "is a tar archive; extract the files in it"),
    "utf-32": ((b"\xff\xfe\x00\x00", b"\x00\x00\xfe\xff"), "is text in UTF-32; save it as UTF-8"),
    "utf-16": ((b"\xff\xfe", b"\xfe\xff"), "is text in UTF-16; save it as UTF-8"),
}


def describe_content(path: Path | str, *expected: str | None) -> str | None:
    """Return the end of an error message about a local file, such as ``is a PDF; extract its text into a file``.

    Returns None if the kind of file is in ``expected``, if the kind is not recognized, or if the file cannot be read.
    """
    head = _read_head(path)
    kind = None if head is None else _recognize(head)
    if kind in _COMPRESSIONS and _is_named_as_tar(path):
        kind = "tar"
    return None if kind is None or kind in expected else _KINDS[kind][1]


def describe_decoded(content: bytes) -> str | None:
    """Return why a file is not text, for an error message, or None if nothing is wrong.

    Call this for a file that can be decoded as UTF-8. The function recognizes tar archives, files that
    contain only NUL bytes, and text in UTF-16. ``content`` is the beginning of the file.
    """
    head = content[:_HEAD_BYTES]
    kind = _recognize(head)
    return _KINDS[kind][1] if kind in _DECODED_KINDS else None


def _recognize(head: bytes) -> str | None:
    if not head:
        return "empty"
    if not head.strip(b"\0") and len(head) > 1:
        return "zeros"
    if _is_utf16_without_mark(head):
        return "utf-16"
    if head[_TAR_MAGIC_OFFSET:].startswith(_TAR_MAGIC):
        return "tar"
    return next((kind for kind in _KINDS if _begins(head, kind)), None)


def _begins(head: bytes, kind: str) -> bool:
    if kind == "html":
        head = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if kind == "arrow" and head.startswith(b"\xff"):  # the length of the schema in bytes follows the marker
        schema_bytes = int.from_bytes(head[4:8], "little")
        return head.startswith(_KINDS[kind][0]) and 0 < schema_bytes < _LONGEST_ARROW_SCHEMA
    return head.startswith(_KINDS[kind][0])


def _is_utf16_without_mark(head: bytes) -> bool:
    """Return whether bytes look like text in UTF-16: zeros are at even positions only, or at odd positions only.

    In UTF-16, each space and each ASCII character has a zero byte, also among other letters. A short text counts only
    if it is all ASCII.
    """
    if len(head) < _SHORTEST_UTF16:
        return False
    for first, encoding in ((0, "utf-16-be"), (1, "utf-16-le")):
        zeros = head[first::2].count(0)
        is_ascii = zeros == len(head[first::2]) and head.isascii()
        if 0 in head[1 - first :: 2] or not (is_ascii or zeros * _LARGEST_BYTES_PER_ZERO >= len(head) >= _FEWEST_BYTES):
            continue
        text = head.decode(encoding, errors="ignore")  # the last character may be incomplete
        if all(c.isprintable() or c in "\ufeff\t\n\r\f" for c in text):
            return True
    return False


def _is_named_as_tar(path: Path | str) -> bool:
    """Return whether the name is that of a compressed tar archive, such as ``x.tgz`` or ``x.tar.xz``."""
    name = Path(path)
    return name.suffix in _COMPRESSED_TAR_SUFFIXES or Path(name.stem).suffix == ".tar"


def begins_as(path: Path | str, kind: str) -> bool:
    """Return whether a file begins like a file of the type ``kind``, for example ``gzip``.

    ``_KINDS`` contains all types. If ``path`` is a URL or cannot be read, its type is unknown, and the result is True.
    """
    head = _read_head(path)
    return head is None or _begins(head, kind)


def _read_head(path: Path | str) -> bytes | None:
    if is_remote(str(path)):
        return None
    try:
        with open(path, "rb") as file:
            return file.read(_HEAD_BYTES)
    except OSError:
        return None


def require_fetched(path: Path | str) -> None:
    """Raise DataError if a local file is only a git-lfs pointer, or OSError if the file does not exist."""
    if os.stat(path).st_size < LARGEST_POINTER_BYTES and os.path.isfile(path):
        with open(path, "rb") as file:
            require_no_pointer(file.read(len(_POINTER_BEGINNING)), path)


def require_no_pointer(head: bytes, path: Path | str) -> None:
    """Raise DataError if the first bytes of a file are those of a git-lfs pointer."""
    if head.startswith(_POINTER_BEGINNING):
        raise DataError(f"{path} {_POINTER}")
