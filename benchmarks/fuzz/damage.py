"""Damage files at random. A random generator with the same seed causes the same damage."""

from __future__ import annotations

import gzip
import json
import random
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

_EDGE_BYTES = 256  # headers and footers are at the edges of a file, so half of all positions are there
_MOST_CHANGED = 8
_LONGEST_INSERTION = 64
_ODD_INTEGERS = (0, 1, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 1 << 62, (1 << 63) - 1, (1 << 64) - 1)
_ODD_VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 1 << 62, 1 << 70, -(1 << 70), 1.5, 1e300, float("nan"), float("inf")),
    *("", " ", "x", "\0", "\ud800", "\x1b[31m", "line\nbreak", "../x", "/", "é" * 300, "9" * 5000),
    *({"k" * 100_000: 1}, {f"key {n}": n for n in range(1000)}),
    *([], [None], [[]], {}, {"": None}, {"a": {"a": 1}}),
)
_LFS_POINTER = (
    b"version https://git-lfs.github.com/spec/v1\n"
    b"oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\nsize 12345\n"
)
_FOREIGN = (
    b"PK\x03\x04" + bytes(60),
    b"\x93NUMPY\x01\x00v\x00{'descr': '|O', 'fortran_order': False, 'shape': (1000000000000,), }\n",
    b"PAR1" + bytes(20) + b"PAR1",
    b"\x1f\x8b\x08\x00" + bytes(20),
    b"\x28\xb5\x2f\xfd" + bytes(20),
    b"\xff\xfe" + "text in UTF-16\n".encode("utf-16-le"),
    b"\xef\xbb\xbf{}\n",
    b"<!DOCTYPE html><html><body>404</body></html>\n",
    b"[" * 100_000,
    b'{"a":' * 100_000,
    b"\0" * 4096,
    b"\n" * 4096,
    _LFS_POINTER,
)

ChangeBytes = Callable[[bytes, random.Random], bytes]


def damage_folder(folder: Path, stream: random.Random) -> str:
    """Damage one or two files in a folder or its subfolders, and return a description of the damage."""
    done = []
    for _ in range(stream.choice((1, 1, 2))):
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        if files:
            done.append(_damage_file(stream.choice(files), folder, stream))
    return "; ".join(done)


def _damage_file(path: Path, folder: Path, stream: random.Random) -> str:
    name = path.relative_to(folder)
    if stream.random() < 0.03:
        path.unlink()
        if stream.random() < 0.5:
            path.mkdir()
            return f"{name}: replaced by a folder"
        return f"{name}: removed"
    content = path.read_bytes()
    if stream.random() < 0.5:
        changed = _change_json(content, stream)
        if changed is not None:
            path.write_bytes(changed)
            return f"{name}: JSON value"
    change = stream.choice(_CHANGES)
    path.write_bytes(change(content, stream))
    return f"{name}: {change.__name__.strip('_')}"


def copy_folder(source: Path, target: Path) -> None:
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target)


def _position(size: int, stream: random.Random) -> int:
    """Return a random offset from 0 to ``size``. Half of the offsets are near the beginning or the end."""
    if stream.random() < 0.5:
        return stream.randint(0, size)
    offset = stream.randint(0, min(size, _EDGE_BYTES))
    return offset if stream.random() < 0.5 else size - offset


def _range(size: int, stream: random.Random) -> tuple[int, int]:
    first, last = sorted((_position(size, stream), _position(size, stream)))
    return first, last


def _truncate(content: bytes, stream: random.Random) -> bytes:
    return content[: _position(len(content), stream)]


def _empty(content: bytes, stream: random.Random) -> bytes:
    return b""


def _flip_bits(content: bytes, stream: random.Random) -> bytes:
    changed = bytearray(content)
    for _ in range(stream.randint(1, _MOST_CHANGED) if content else 0):
        changed[min(_position(len(content), stream), len(content) - 1)] ^= 1 << stream.randrange(8)
    return bytes(changed)


def _put_integer(content: bytes, stream: random.Random) -> bytes:
    layout = stream.choice("BHIQ")
    size = struct.calcsize(f"<{layout}")
    if len(content) < size:
        return content
    at = min(_position(len(content), stream), len(content) - size)
    value = stream.choice(_ODD_INTEGERS) & ((1 << 8 * size) - 1)
    return content[:at] + struct.pack(f"<{layout}", value) + content[at + size :]


def _insert(content: bytes, stream: random.Random) -> bytes:
    at = _position(len(content), stream)
    return content[:at] + stream.randbytes(stream.randint(1, _LONGEST_INSERTION)) + content[at:]


def _delete(content: bytes, stream: random.Random) -> bytes:
    first, last = _range(len(content), stream)
    return content[:first] + content[last:]


def _repeat(content: bytes, stream: random.Random) -> bytes:
    first, last = _range(len(content), stream)
    return content[:last] + content[first:]


def _swap(content: bytes, stream: random.Random) -> bytes:
    first, last = _range(len(content), stream)
    return content[:first] + content[last:] + content[first:last]


def _zeros(content: bytes, stream: random.Random) -> bytes:
    first, last = _range(len(content), stream)
    return content[:first] + bytes(last - first) + content[last:]


def _noise(content: bytes, stream: random.Random) -> bytes:
    return stream.randbytes(stream.choice((1, 2, 7, 100, 5000)))


def _foreign(content: bytes, stream: random.Random) -> bytes:
    return stream.choice(_FOREIGN)


def _append_zeros(content: bytes, stream: random.Random) -> bytes:
    return content + bytes(stream.choice((1, 8, 512)))


def _compress(content: bytes, stream: random.Random) -> bytes:
    return gzip.compress(content, mtime=0)


def _expand(content: bytes, stream: random.Random) -> bytes:
    return gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content[: len(content) // 2]


def _mark(content: bytes, stream: random.Random) -> bytes:
    return b"\xef\xbb\xbf" + content


_CHANGES: tuple[ChangeBytes, ...] = (
    *(_truncate, _truncate, _empty, _flip_bits, _flip_bits, _put_integer, _put_integer, _insert, _delete),
    *(_repeat, _swap, _zeros, _noise, _foreign, _foreign, _append_zeros, _compress, _expand, _mark),
)


def _change_json(content: bytes, stream: random.Random) -> bytes | None:
    """Replace, delete or add a value in a JSON file or in a line of a JSON Lines file. Returns None for other files.

    A manifest's hash of itself is removed, so that commands read the changed value.
    """
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):
        lines = content.splitlines(keepends=True)
        if len(lines) < 2 or not lines[0].startswith((b"{", b"[")):
            return None
        at = stream.randrange(len(lines))
        changed = _change_json(lines[at], stream)
        return None if changed is None else b"".join([*lines[:at], changed + b"\n", *lines[at + 1 :]])
    if isinstance(value, dict):
        value.pop("sha256", None)
    return json.dumps(change_value(value, stream)).encode()


def change_value(value: Any, stream: random.Random) -> Any:
    """Return a copy of a JSON value with one change: a value at any depth is replaced, deleted or added."""
    if isinstance(value, (dict, list)) and value and stream.random() < 0.85:
        key = stream.choice(sorted(value)) if isinstance(value, dict) else stream.randrange(len(value))
        if stream.random() < 0.1:
            del value[key]
        else:
            value[key] = change_value(value[key], stream)
        return value
    if isinstance(value, dict) and stream.random() < 0.5:
        return {**value, "extra": stream.choice(_ODD_VALUES)}
    if isinstance(value, int) and stream.random() < 0.3:
        return value + stream.choice((-1, 1, 1 << 20))
    return stream.choice(_ODD_VALUES)
