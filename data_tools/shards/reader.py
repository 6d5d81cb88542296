"""Reading shards: one virtual, memory-mapped stream of tokens per split."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa

from data_tools.arrays import CountArray, TokenArray
from data_tools.errors import DataError
from data_tools.shards.manifest import MANIFEST_NAME, Manifest, ShardRecord, load_manifest
from data_tools.storage import sha256_of_file

TOKEN_DTYPE = np.dtype("<u2")
# What an Arrow IPC stream ends with: the continuation marker and a length of zero.
_ARROW_END_OF_STREAM = b"\xff\xff\xff\xff\x00\x00\x00\x00"
_SCAN_TOKENS = 1 << 22


class TokenStream:
    """The shards of one split as a single stream of tokens; open it with ``open_split``.

    Nothing is loaded: shards are memory-mapped, and only what a read touches comes into memory.

    Attributes:
        manifest: of the folder.
        split: the split's name.
        tokens, documents, utf8_bytes: totals over the split.
    """

    def __init__(self, folder: Path, manifest: Manifest, split: str) -> None:
        shards = manifest.shards_of(split)
        self.manifest = manifest
        self.split = split
        self.tokens = sum(shard.tokens for shard in shards)
        self.documents = sum(shard.documents for shard in shards)
        self.utf8_bytes = sum(shard.utf8_bytes for shard in shards)
        self._folder = folder
        self._segments = [segment for shard in shards for segment in map_shard(folder, shard) if segment.size]
        lengths = np.array([segment.size for segment in self._segments], dtype=np.int64)
        self._ends = np.cumsum(lengths)
        self._starts = self._ends - lengths

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
        self._check_range(start, start, length)
        tokens = np.empty(length, dtype=np.uint16)
        self._copy_into(tokens, start)
        self._check_vocabulary(tokens, start)
        return tokens

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
        if len(starts) == 0:
            return np.empty((0, length), dtype=np.uint16)
        self._check_range(int(starts.min()), int(starts.max()), length)
        windows = np.empty((len(starts), length), dtype=np.uint16)
        for window, start in zip(windows, starts.tolist(), strict=True):
            self._copy_into(window, start)
        self._check_vocabulary(windows, int(starts.min()))
        return windows

    def _copy_into(self, window: TokenArray, start: int) -> None:
        filled = 0
        index = int(np.searchsorted(self._ends, start, side="right"))
        while filled < window.size:
            offset = start + filled - int(self._starts[index])
            piece = self._segments[index][offset : offset + window.size - filled]
            window[filled : filled + piece.size] = piece
            filled += piece.size
            index += 1

    def _check_range(self, first_start: int, last_start: int, length: int) -> None:
        if length < 0 or first_start < 0 or last_start + length > self.tokens:
            start = first_start if first_start < 0 else last_start
            raise DataError(
                f"{self._folder}: split {self.split!r} has {self.tokens} tokens, "
                f"{length} tokens from {start} on are not all among them"
            )

    def _check_vocabulary(self, tokens: TokenArray, start: int) -> None:
        vocab_size = self.manifest.tokenizer.vocab_size
        if tokens.size and int(tokens.max()) >= vocab_size:
            raise DataError(
                f"{self._folder}: split {self.split!r} holds token {int(tokens.max())} in a read from {start} on, "
                f"the vocabulary ends at {vocab_size - 1}; the shard is damaged, delete the folder and tokenize again"
            )


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


def verify(folder: Path | str) -> Manifest:
    """Recompute all that the manifest says about its shards: hashes, counts, ids inside the vocabulary.

    Raises:
        DataError: names the first shard that differs, and how.
    """
    folder = Path(folder)
    manifest = load_manifest(folder)
    for shard in manifest.shards:
        segments = map_shard(folder, shard)
        expect_unchanged(folder, shard)
        _check_contents(folder / shard.file, segments, shard, manifest)
    return manifest


def expect_unchanged(folder: Path, shard: ShardRecord) -> None:
    """Hash one shard.

    Raises:
        DataError: its SHA-256 is not the one in the manifest.
    """
    path = folder / shard.file
    try:
        unchanged = sha256_of_file(path) == shard.sha256
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
    if not unchanged:
        raise DataError(f"{path}: its SHA-256 is not the one in {MANIFEST_NAME}; delete the folder and tokenize again")


def _check_contents(path: Path, segments: list[TokenArray], shard: ShardRecord, manifest: Manifest) -> None:
    largest, documents = 0, 0
    for segment in segments:
        for start in range(0, segment.size, _SCAN_TOKENS):
            tokens = segment[start : start + _SCAN_TOKENS]
            largest = max(largest, int(tokens.max()))
            documents += int(np.count_nonzero(tokens == manifest.tokenizer.end_of_text))
    if largest >= manifest.tokenizer.vocab_size:
        raise DataError(f"{path} holds token {largest}, the vocabulary ends at {manifest.tokenizer.vocab_size - 1}")
    if documents != shard.documents:
        raise DataError(f"{path} holds {documents} documents, {MANIFEST_NAME} says {shard.documents}")


def map_shard(folder: Path, shard: ShardRecord) -> list[TokenArray]:
    """Memory-map one shard as the pieces that are contiguous in its file.

    Raises:
        DataError: the file is missing, unreadable, in another format, or does not hold the tokens recorded.
    """
    path = folder / shard.file
    map_file = {".npy": _map_npy, ".arrow": _map_arrow}.get(path.suffix)
    if map_file is None:
        raise DataError(f"{path}: a shard's name ends in .npy or .arrow")
    try:
        segments = map_file(path)
    except FileNotFoundError as error:
        raise DataError(
            f"{path} is missing, though {MANIFEST_NAME} names it; delete the folder and tokenize again"
        ) from error
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(
            f"{path} is not a whole shard of uint16 tokens ({reason}); delete the folder and tokenize again"
        ) from error
    tokens = sum(segment.size for segment in segments)
    if tokens != shard.tokens:
        raise DataError(
            f"{path} holds {tokens} tokens, {MANIFEST_NAME} says {shard.tokens}; delete the folder and tokenize again"
        )
    return segments


def _map_npy(path: Path) -> list[TokenArray]:
    tokens = np.lib.format.open_memmap(path, mode="r")
    if tokens.dtype != TOKEN_DTYPE or tokens.ndim != 1:
        raise ValueError("its header says otherwise")
    if tokens.offset + tokens.nbytes != path.stat().st_size:
        raise ValueError("it has bytes after its tokens")
    return [tokens.view(np.ndarray)]


def _map_arrow(path: Path) -> list[TokenArray]:
    with pa.memory_map(str(path)) as file:
        reader = pa.ipc.open_stream(file)
        if reader.schema.names != ["tokens"] or reader.schema.field("tokens").type != pa.uint16():
            raise ValueError("its one column must be 'tokens' of uint16")
        segments = [batch.column(0).to_numpy(zero_copy_only=True) for batch in reader]
        end = file.tell()
        if end != file.size() or file.read_at(8, end - 8) != _ARROW_END_OF_STREAM:
            raise ValueError("it does not end where its tokens end")
        return segments
