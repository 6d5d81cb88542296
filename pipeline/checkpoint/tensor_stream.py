"""Writing a safetensors file tensor by tensor. The library's own functions need all tensors in memory."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data_tools.storage.atomic import fsync_file

_HEADER_ALIGNMENT = 8
_DTYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16"}  # the names in safetensors


@dataclass(frozen=True)
class StreamedTensor:
    """A tensor that is read when it is written."""

    shape: list[int]
    dtype: torch.dtype
    read: Callable[[], Iterable[Tensor]]  # returns its elements in order, in one or more slices


def write_tensors(path: Path, tensors: dict[str, StreamedTensor], metadata: dict[str, str] | None = None) -> str:
    """Write and fsync a safetensors file with one slice of one tensor in memory at a time.

    The format is the length of the header in 8 bytes, the header in JSON, and the elements of all tensors.

    Args:
        tensors: by key, in the order in the file.
        metadata: of the file.

    Returns:
        The SHA-256 of what was written.
    """
    digest = hashlib.sha256()
    with path.open("wb") as file:
        for content in _file_contents(tensors, metadata):
            digest.update(content)
            file.write(content)
    fsync_file(path)
    return digest.hexdigest()


def _file_contents(tensors: dict[str, StreamedTensor], metadata: dict[str, str] | None) -> Iterator[bytes | memoryview]:
    yield _header(tensors, metadata)
    for tensor in tensors.values():
        for elements in tensor.read():
            yield elements.to(tensor.dtype).contiguous().view(-1).view(torch.uint8).numpy().data


def _header(tensors: dict[str, StreamedTensor], metadata: dict[str, str] | None) -> bytes:
    entries: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    end = 0
    for key, tensor in tensors.items():
        begin, end = end, end + tensor.dtype.itemsize * torch.Size(tensor.shape).numel()
        entries[key] = {"dtype": _DTYPE_NAMES[tensor.dtype], "shape": tensor.shape, "data_offsets": [begin, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _HEADER_ALIGNMENT)
    return struct.pack("<Q", len(text)) + text
