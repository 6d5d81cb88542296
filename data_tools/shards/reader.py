"""Read the shards of a split as one stream of tokens."""

from pathlib import Path

import numpy as np

from data_tools.arrays import CountArray, MaskArray, TokenArray
from data_tools.errors import DataError
from data_tools.shards.manifest import TOKENIZE_AGAIN, Manifest, load_manifest
from data_tools.shards.mapping import MASK_DTYPE, Mapped, map_mask, map_shard, require_flags


class TokenStream:
    """The tokens of all shards of a split, as one stream. Use ``open_split`` to get an instance.

    Tokens are loaded from disk only when they are read.

    Attributes:
        manifest: the manifest of the folder.
        split: the name of the split.
        tokens: the number of tokens in the split.
        documents: the number of documents in the split.
        utf8_bytes: the number of bytes of text in the split.
        has_mask: whether a mask says which tokens are scored (count in the loss). If False, all tokens are scored.
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

    def __reduce__(self) -> tuple[object, ...]:
        # Pickling a memory map would copy its data, so another process maps the files again.
        return open_split, (self._folder, self.split)

    def read(self, start: int, length: int) -> TokenArray:
        """Return a copy of ``length`` tokens from index ``start`` on, uint16 of shape (length,).

        Raises:
            DataError: the stream does not contain this range, or a token is outside the vocabulary.
        """
        return self.read_windows(np.array([start], dtype=np.int64), length)[0]

    def read_windows(self, starts: CountArray, length: int) -> TokenArray:
        """Return a copy of several windows of T consecutive tokens, uint16 of shape (B, T).

        Args:
            starts: the index of the first token of each window, int64 of shape (B,).
            length: the window length T.

        Raises:
            DataError: the stream does not contain a window, or a token is outside the vocabulary.
        """
        self._require_in_range(starts, length)
        windows = np.empty((len(starts), length), dtype=np.uint16)
        self._token_pieces.copy_into(windows, starts)
        self._require_in_vocabulary(windows, starts)
        return windows

    def read_mask_windows(self, starts: CountArray, length: int) -> MaskArray:
        """Return which tokens in several windows are scored (count in the loss), bool of shape (B, T).

        The split must have a mask. The arguments are those of ``read_windows``.

        Raises:
            DataError: the stream does not contain a window, or the mask contains a value that is neither 0 nor 1.
        """
        assert self.has_mask, f"{self._folder}: the split {self.split!r} has no mask"
        self._require_in_range(starts, length)
        windows = np.empty((len(starts), length), dtype=MASK_DTYPE)
        self._mask_pieces.copy_into(windows, starts)
        require_flags(windows, f"{self._folder}: the mask of split {self.split!r}")
        return windows.view(np.bool_)

    def _require_in_range(self, starts: CountArray, length: int) -> None:
        first, last = (int(starts.min()), int(starts.max())) if starts.size else (0, 0)
        if length < 0 or first < 0 or (starts.size and last + length > self.tokens):
            start = first if first < 0 else last
            raise DataError(
                f"{self._folder}: split {self.split!r} has {self.tokens} tokens, "
                f"a read of {length} tokens from {start} on leaves it"
            )

    def _require_in_vocabulary(self, windows: TokenArray, starts: CountArray) -> None:
        vocab_size = self.manifest.tokenizer.vocab_size
        if windows.size and int(windows.max()) >= vocab_size:
            start = int(starts[int(windows.max(axis=1).argmax())])
            raise DataError(
                f"{self._folder}: split {self.split!r} holds token {int(windows.max())} in a read from {start} on, "
                f"the vocabulary ends at {vocab_size - 1}; the shard is damaged, {TOKENIZE_AGAIN}"
            )


class _Pieces:
    """Mapped arrays that are read as if they were concatenated."""

    def __init__(self, pieces: list[Mapped]) -> None:
        self._pieces = [piece for piece in pieces if piece.size]
        lengths = np.array([piece.size for piece in self._pieces], dtype=np.int64)
        self._ends = np.cumsum(lengths)
        self._starts = self._ends - lengths

    def copy_into(self, windows: Mapped, starts: CountArray) -> None:
        """Copy the values that begin at ``starts``, shape (B,), into the rows of ``windows``, shape (B, T).

        The caller must check the range.
        """
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
    """Open a split of a folder of token shards.

    Only the formats and sizes of the shards are checked. To check their contents, call ``shards.verification.verify``.

    Raises:
        DataError: the manifest cannot be used, the split is missing or empty, or a shard is missing or has the wrong
            format or size.
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
