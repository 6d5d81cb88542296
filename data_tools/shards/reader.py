"""Reading shards: one virtual, memory-mapped stream of tokens per split."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from data_tools.arrays import CountArray, MaskArray, TokenArray, from_arrow
from data_tools.errors import DataError
from data_tools.shards.llmc import LLMC_SUFFIX, llmc_tokens
from data_tools.shards.manifest import MANIFEST_NAME, Manifest, ShardRecord, load_manifest

TOKEN_DTYPE = np.dtype("<u2")
MASK_DTYPE = np.dtype("u1")
# What an Arrow IPC stream ends with: the continuation marker and a length of zero.
_ARROW_END_OF_STREAM = b"\xff\xff\xff\xff\x00\x00\x00\x00"
_SCAN_TOKENS = 1 << 22

Mapped = npt.NDArray[Any]


class TokenStream:
    """The shards of one split as a single stream of tokens; open it with ``open_split``.

    Nothing is loaded: shards are memory-mapped, and only what a read touches comes into memory.

    Attributes:
        manifest: of the folder.
        split: the split's name.
        tokens, documents, utf8_bytes: totals over the split.
        has_mask: whether a mask says which tokens are scored as targets; without one all are.
    """

    def __init__(self, folder: Path, manifest: Manifest, split: str) -> None:
        shards = manifest.shards_of(split)
        self.manifest = manifest
        self.split = split
        self.tokens = sum(shard.tokens for shard in shards)
        self.documents = sum(shard.documents for shard in shards)
        self.utf8_bytes = sum(shard.utf8_bytes for shard in shards)
        self.has_mask = any(shard.mask_sha256 for shard in shards)
        self._folder = folder
        self._token_pieces = _Pieces([piece for shard in shards for piece in map_shard(folder, shard)])
        self._mask_pieces = _Pieces([map_mask(folder, shard) for shard in shards if shard.mask_sha256])

    def __len__(self) -> int:
        return self.tokens

    def __reduce__(self) -> tuple[object, ...]:
        # A memory map would be pickled as a copy of the data; another process maps the files again.
        return open_split, (self._folder, self.split)

    def read(self, start: int, length: int) -> TokenArray:
        """Tokens ``start`` to ``start + length`` of the stream, across shards where needed.

        Returns:
            uint16 of shape (length,), a copy.

        Raises:
            DataError: the range leaves the stream, or a token is outside the vocabulary.
        """
        return self.read_windows(np.array([start], dtype=np.int64), length)[0]

    def read_windows(self, starts: CountArray, length: int) -> TokenArray:
        """Windows of equal length that begin anywhere.

        Args:
            starts: int64 of shape (B,), the first token of each window.
            length: T, tokens per window.

        Returns:
            uint16 of shape (B, T).

        Raises:
            DataError: a window leaves the stream, or a token is outside the vocabulary.
        """
        self._check_range(starts, length)
        windows = np.empty((len(starts), length), dtype=np.uint16)
        self._token_pieces.copy_into(windows, starts)
        self._check_vocabulary(windows, starts)
        return windows

    def read_mask_windows(self, starts: CountArray, length: int) -> MaskArray:
        """Which tokens of the windows are scored; for a split that has a mask.

        Args:
            starts: int64 of shape (B,), the first token of each window.
            length: T, tokens per window.

        Returns:
            bool of shape (B, T).

        Raises:
            DataError: a window leaves the stream, or the mask holds anything but 0 and 1.
        """
        assert self.has_mask, f"{self._folder}: the split {self.split!r} has no mask"
        self._check_range(starts, length)
        windows = np.empty((len(starts), length), dtype=MASK_DTYPE)
        self._mask_pieces.copy_into(windows, starts)
        expect_flags(windows, f"{self._folder}: the mask of split {self.split!r}")
        return windows.view(np.bool_)

    def _check_range(self, starts: CountArray, length: int) -> None:
        first, last = (int(starts.min()), int(starts.max())) if starts.size else (0, 0)
        if length < 0 or first < 0 or (starts.size and last + length > self.tokens):
            start = first if first < 0 else last
            raise DataError(
                f"{self._folder}: split {self.split!r} has {self.tokens} tokens, "
                f"{length} tokens from {start} on are not all among them"
            )

    def _check_vocabulary(self, windows: TokenArray, starts: CountArray) -> None:
        vocab_size = self.manifest.tokenizer.vocab_size
        if windows.size and int(windows.max()) >= vocab_size:
            start = int(starts[int(windows.max(axis=1).argmax())])
            raise DataError(
                f"{self._folder}: split {self.split!r} holds token {int(windows.max())} in a read from {start} on, "
                f"the vocabulary ends at {vocab_size - 1}; the shard is damaged, delete the folder and tokenize again"
            )


class _Pieces:
    """Mapped arrays end to end, read as one."""

    def __init__(self, pieces: list[Mapped]) -> None:
        self._pieces = [piece for piece in pieces if piece.size]
        lengths = np.array([piece.size for piece in self._pieces], dtype=np.int64)
        self._ends = np.cumsum(lengths)
        self._starts = self._ends - lengths

    def copy_into(self, windows: Mapped, starts: CountArray) -> None:
        """Fill each row of ``windows`` (B, T) with what follows its start, (B,); the range was checked."""
        _, length = windows.shape
        if not length:
            return
        indices = np.searchsorted(self._ends, starts, side="right")
        offsets = starts - self._starts[indices]
        for window, index, offset in zip(windows, indices.tolist(), offsets.tolist(), strict=True):
            filled = 0
            while filled < length:
                piece = self._pieces[index][offset : offset + length - filled]
                window[filled : filled + piece.size] = piece
                filled, index, offset = filled + piece.size, index + 1, 0


def open_split(folder: Path | str, split: str) -> TokenStream:
    """Open a split of a folder of shards, in time proportional to the number of shards.

    Sizes are checked against the manifest, contents are not: ``verify`` does that.

    Raises:
        DataError: the manifest is unusable, the split does not exist or is empty, or a shard is missing,
            short, long, or no shard at all.
    """
    folder = Path(folder)
    manifest = load_manifest(folder)
    if split not in manifest.splits():
        raise DataError(f"{folder} has no split {split!r}; it has {', '.join(manifest.splits()) or 'none'}")
    stream = TokenStream(folder, manifest, split)
    if stream.tokens == 0:
        others = [name for name in manifest.splits() if manifest.tokens_of(name)]
        raise DataError(f"{folder}: split {split!r} is empty; splits with tokens: {', '.join(others) or 'none'}")
    return stream


def map_shard(folder: Path, shard: ShardRecord) -> list[TokenArray]:
    """Memory-map one shard as the pieces that are contiguous in its file.

    Raises:
        DataError: the file is missing, unreadable, in another format, or does not hold the tokens recorded.
    """
    path = folder / shard.file
    map_file = {".npy": _map_npy, ".arrow": _map_arrow, LLMC_SUFFIX: _map_llmc}.get(path.suffix)
    if map_file is None:
        raise DataError(f"{path}: a shard's name ends in .npy, .arrow or {LLMC_SUFFIX}")
    segments = _mapped_whole(path, map_file, "shard of uint16 tokens")
    tokens = sum(segment.size for segment in segments)
    if tokens != shard.tokens:
        raise DataError(
            f"{path} holds {tokens} tokens, {MANIFEST_NAME} says {shard.tokens}; delete the folder and tokenize again"
        )
    return segments


def map_mask(folder: Path, shard: ShardRecord) -> Mapped:
    """Memory-map the mask of a shard that has one, uint8 of shape (tokens,): 1 where a token is scored.

    Raises:
        DataError: the file is missing, unreadable, no such mask, or not of as many tokens as the shard.
    """
    assert shard.mask_file, f"{shard.file} has no mask"
    path = folder / shard.mask_file
    mask: Mapped = _mapped_whole(path, lambda path: _map_npy(path, MASK_DTYPE), "mask of uint8 flags")[0]
    if mask.size != shard.tokens:
        raise DataError(
            f"{path} is the mask of {mask.size} tokens, {MANIFEST_NAME} says {shard.tokens}; "
            "delete the folder and tokenize again"
        )
    return mask


def expect_flags(mask: Mapped, place: str) -> None:
    """Look at all of a mask.

    Raises:
        DataError: it holds anything but 0 and 1; ``place`` says where.
    """
    for start in range(0, len(mask), _SCAN_TOKENS):
        largest = int(mask[start : start + _SCAN_TOKENS].max(initial=0))
        if largest > 1:
            raise DataError(f"{place} holds {largest}, it may hold 0 and 1; delete the folder and tokenize again")


def _mapped_whole(path: Path, map_file: Callable[[Path], list[Mapped]], kind: str) -> list[Mapped]:
    try:
        return map_file(path)
    except FileNotFoundError as error:
        raise DataError(
            f"{path} is missing, though {MANIFEST_NAME} names it; delete the folder and tokenize again"
        ) from error
    except Exception as error:
        if isinstance(error, OSError) and error.errno:
            raise DataError(f"cannot read {path}: {os.strerror(error.errno)}") from error
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(f"{path} is not a whole {kind} ({reason}); delete the folder and tokenize again") from error


def map_bytes(path: Path) -> pa.Buffer:
    """A file's bytes, mapped: no descriptor stays open, however many files are mapped, and nothing is read yet."""
    with pa.memory_map(str(path)) as file:
        size = file.size()
        # A longer read would have the system fetch all that it covers. One byte keeps the whole mapping alive.
        first = file.read_buffer(1)
        file.seek(size - 1)
        last = file.read_buffer(1)
    if last.address - first.address != size - 1:
        raise ValueError("it cannot be mapped as a whole")
    return pa.foreign_buffer(first.address, size, base=first)


def _map_npy(path: Path, dtype: np.dtype[Any] = TOKEN_DTYPE) -> list[Mapped]:
    buffer = map_bytes(path)
    file = pa.BufferReader(buffer)
    version = np.lib.format.read_magic(file)
    read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, found_dtype = read_header(file)
    if found_dtype != dtype or len(shape) != 1:
        raise ValueError("its header says otherwise")
    missing_bytes = file.tell() + shape[0] * dtype.itemsize - buffer.size
    if missing_bytes:
        raise ValueError("it is cut short" if missing_bytes > 0 else "it has bytes after its tokens")
    return [np.frombuffer(buffer, dtype=dtype, offset=file.tell())]


def _map_arrow(path: Path) -> list[Mapped]:
    buffer = map_bytes(path)
    file = pa.BufferReader(buffer)
    reader = pa.ipc.open_stream(file)
    if reader.schema.names != ["tokens"] or reader.schema.field("tokens").type != pa.uint16():
        raise ValueError("its one column must be 'tokens' of uint16")
    segments = [from_arrow(batch.column(0), np.uint16) for batch in reader]
    end = file.tell()
    if end != buffer.size or file.read_at(8, end - 8) != _ARROW_END_OF_STREAM:
        raise ValueError("it does not end where its tokens end")
    return segments


def _map_llmc(path: Path) -> list[Mapped]:
    return [llmc_tokens(map_bytes(path))]
