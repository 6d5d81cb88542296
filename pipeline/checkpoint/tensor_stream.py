"""Write a safetensors file with only one tensor in memory at a time.

The safetensors library needs all tensors in memory.
"""

import hashlib
import json
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data_tools.storage.atomic import drop_from_page_cache, fsync_file
from data_tools.storage.sha256 import sha256_of_file
from pipeline.checkpoint.finite import describe_not_finite
from pipeline.checkpoint.manifest import FileEntry
from pipeline.errors import CheckpointError

_HEADER_ALIGNMENT = 8
_DTYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16"}  # the names in safetensors


@dataclass(frozen=True)
class StreamedTensor:
    """A tensor to write. ``read`` returns the tensor, and is called just before the tensor is written."""

    shape: list[int]
    dtype: torch.dtype  # the dtype in the file
    read: Callable[[], Tensor]


TensorGroups = dict[str, dict[str, StreamedTensor]]  # weights or moments -> key -> tensor


def in_memory(tensor: Tensor) -> StreamedTensor:
    return StreamedTensor(list(tensor.shape), tensor.dtype, lambda: tensor)


def write_tensors(path: Path, tensors: dict[str, StreamedTensor], metadata: dict[str, str] | None = None) -> FileEntry:
    """Write and fsync a safetensors file, and read it back. Only one tensor is in memory at a time.

    Where the system can drop a file from the page cache, the bytes are read back from the disk or the server
    (``drop_from_page_cache``).

    If all tensors have one dtype, the file has the same bytes as a file from the safetensors library.

    Returns:
        The file's entry for a checkpoint's manifest.

    Raises:
        CheckpointError: the file differs from the bytes that were written.
        OSError: the file cannot be written.
    """
    tensors = dict(sorted(tensors.items()))
    header = _header(tensors, metadata)
    digest, is_finite = hashlib.sha256(header), True
    with path.open("wb") as file:
        file.write(header)
        for tensor in tensors.values():
            elements = tensor.read().to(tensor.dtype).flatten()
            is_finite = is_finite and describe_not_finite(elements) is None
            content = elements.view(torch.uint8).numpy().data
            digest.update(content)
            file.write(content)
    fsync_file(path)
    drop_from_page_cache(path)
    if sha256_of_file(path) != digest.hexdigest():
        raise CheckpointError(f"{path.name}: was not written correctly")
    return FileEntry(path.stat().st_size, digest.hexdigest(), is_finite)


def _header(tensors: dict[str, StreamedTensor], metadata: dict[str, str] | None) -> bytes:
    entries: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    end = 0
    for key, tensor in tensors.items():
        begin, end = end, end + tensor.dtype.itemsize * torch.Size(tensor.shape).numel()
        entries[key] = {"dtype": _DTYPE_NAMES[tensor.dtype], "shape": tensor.shape, "data_offsets": [begin, end]}
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % _HEADER_ALIGNMENT)
    return struct.pack("<Q", len(header)) + header
