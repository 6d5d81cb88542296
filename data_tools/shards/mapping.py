"""Memory-map mask files and token shards of three formats. Tokens are read from disk only when they are used."""

import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from data_tools.arrays import TokenArray
from data_tools.errors import DataError
from data_tools.shards.llmc import LLMC_SUFFIX, llmc_tokens
from data_tools.shards.manifest import MANIFEST_NAME, TOKENIZE_AGAIN, ShardRecord
from data_tools.storage.content import describe_content, require_fetched

# In CPython 3.11 and 3.12, two threads that parse Python at the same time can disturb each other (gh-106905).
_HEADER_LOCK = threading.Lock()

MASK_DTYPE = np.dtype("u1")
_TOKEN_DTYPE = np.dtype("<u2")
# The end of an Arrow IPC stream: the continuation marker and a length of zero.
_ARROW_END_OF_STREAM = b"\xff\xff\xff\xff\x00\x00\x00\x00"
_SCAN_TOKENS = 1 << 22

Mapped = npt.NDArray[Any]


def map_shard(folder: Path, shard: ShardRecord) -> list[TokenArray]:
    """Memory-map a shard, and return its tokens as a list of arrays. Only the Arrow format can have several arrays."""
    path = folder / shard.file
    if path.suffix not in _PIECES_BY_SUFFIX:
        raise DataError(f"{path}: a shard's name ends in .npy, .arrow or {LLMC_SUFFIX}")
    pieces = _map_whole_file(path, _PIECES_BY_SUFFIX[path.suffix], "shard of uint16 tokens")
    tokens = sum(piece.size for piece in pieces)
    if tokens != shard.tokens:
        raise DataError(f"{path} holds {tokens} tokens, {MANIFEST_NAME} says {shard.tokens}; {TOKENIZE_AGAIN}")
    return pieces


def map_mask(folder: Path, shard: ShardRecord) -> Mapped:
    """Memory-map the mask of a shard, uint8 of shape (tokens,). The shard must have a mask.

    A value is 1 if the token is scored (counts in the loss), otherwise 0.
    """
    assert shard.mask_file, f"{shard.file} has no mask"
    path = folder / shard.mask_file
    (mask,) = _map_whole_file(path, lambda content: [npy_tokens(content, MASK_DTYPE)], "mask of uint8 flags")
    if mask.size != shard.tokens:
        raise DataError(
            f"{path} is the mask of {mask.size} tokens, {MANIFEST_NAME} says {shard.tokens}; {TOKENIZE_AGAIN}"
        )
    return mask


def require_flags(mask: Mapped, place: str) -> None:
    """Raise DataError if a mask contains a value that is neither 0 nor 1."""
    for start in range(0, len(mask), _SCAN_TOKENS):
        largest = int(mask[start : start + _SCAN_TOKENS].max(initial=0))
        if largest > 1:
            raise DataError(f"{place} holds {largest}, it may hold 0 and 1; {TOKENIZE_AGAIN}")


def map_bytes(path: Path) -> pa.Buffer:
    """Memory-map a file. No file descriptor stays open, so any number of files can be mapped.

    Raises:
        DataError: the file is a git-lfs pointer.
        OSError: the file is missing, empty or unreadable.
        ValueError: Arrow has mapped the file as several ranges of memory. Arrow 26 always maps a file as one range.
    """
    require_fetched(path)
    with pa.memory_map(os.fsencode(path)) as file:  # as bytes, because a name may contain bytes that are not UTF-8
        size = file.size()
        # A longer read would prefetch the whole file. A buffer of one byte keeps the mapping open.
        first = file.read_buffer(1)
        file.seek(size - 1)
        last = file.read_buffer(1)
    if last.address - first.address != size - 1:
        raise ValueError("it cannot be mapped as a whole")
    return pa.foreign_buffer(first.address, size, base=first)


def _map_whole_file(path: Path, pieces_of: Callable[[pa.Buffer], list[Mapped]], kind: str) -> list[Mapped]:
    try:
        return pieces_of(map_bytes(path))
    except FileNotFoundError as error:
        raise DataError(f"{path} is missing, though {MANIFEST_NAME} names it; {TOKENIZE_AGAIN}") from error
    except DataError:
        raise
    except Exception as error:  # numpy and Arrow raise many kinds of errors for damaged files
        if isinstance(error, OSError) and error.errno:
            raise DataError(f"cannot read {path}: {os.strerror(error.errno)}") from error
        found = describe_content(path, path.suffix[1:])
        reason = f"it {found}" if found else (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(f"{path} is not a whole {kind} ({reason}); {TOKENIZE_AGAIN}") from error


def npy_tokens(content: pa.Buffer, dtype: np.dtype[Any] = _TOKEN_DTYPE) -> Mapped:
    """Return the array in the content of a ``.npy`` file, without a copy.

    Raises:
        ValueError: the header is damaged, does not match the size of the content, or has another dtype or shape.
    """
    file = pa.BufferReader(content)
    try:
        version = np.lib.format.read_magic(file)
        read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        with _HEADER_LOCK:
            shape, _, found_dtype = read_header(file)
    except Exception as error:  # numpy parses the header as Python, which can fail in many ways
        raise ValueError(f"its header is damaged ({(str(error).splitlines() or ['it ends early'])[0]})") from error
    if found_dtype != dtype or len(shape) != 1:
        raise ValueError(f"its header says {found_dtype.str} of shape {shape}, expected {dtype.str} of one dimension")
    missing_bytes = file.tell() + shape[0] * dtype.itemsize - content.size
    if missing_bytes:
        raise ValueError("it is cut short" if missing_bytes > 0 else "it has bytes after its tokens")
    return np.frombuffer(content, dtype=dtype, offset=file.tell())


def _arrow_pieces(buffer: pa.Buffer) -> list[Mapped]:
    file = pa.BufferReader(buffer)
    reader = pa.ipc.open_stream(file)
    if reader.schema.names != ["tokens"] or reader.schema.field("tokens").type != pa.uint16():
        raise ValueError("its one column must be 'tokens' of uint16")
    columns = [batch.column(0) for batch in reader]
    if any(column.null_count for column in columns):
        raise ValueError("it has nulls")
    end = file.tell()
    if end != buffer.size or file.read_at(8, end - 8) != _ARROW_END_OF_STREAM:
        raise ValueError("it does not end where its tokens end")
    # Arrow's own conversion to numpy would import pandas, which is slow.
    return [np.frombuffer(it.buffers()[1], dtype=_TOKEN_DTYPE, count=len(it), offset=2 * it.offset) for it in columns]


_PIECES_BY_SUFFIX: dict[str, Callable[[pa.Buffer], list[Mapped]]] = {
    ".npy": lambda content: [npy_tokens(content)],
    ".arrow": _arrow_pieces,
    LLMC_SUFFIX: lambda buffer: [llmc_tokens(buffer)],
}
