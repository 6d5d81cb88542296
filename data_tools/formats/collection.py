"""Tokens of any format as a collection: splits, each one stream that can be read anywhere."""

from __future__ import annotations

import errno
import re
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Protocol

import numpy as np
import pyarrow as pa

from data_tools.arrays import TokenArray
from data_tools.errors import DataError, one_line_read_errors
from data_tools.shards.contents import gpt2_tokenizer_record
from data_tools.shards.manifest import TRAIN_SPLIT, VAL_SPLIT, Manifest, ShardRecord, SourceRecord, TokenizerRecord
from data_tools.shards.mapping import map_bytes

_SPLIT_WORDS = {
    "train": TRAIN_SPLIT,
    "val": VAL_SPLIT,
    "valid": VAL_SPLIT,
    "validation": VAL_SPLIT,
    "test": "test",
}
_SPLIT_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


class Tokens(Protocol):
    """A stream of tokens of known length; ``TokenStream`` is one."""

    @property
    def tokens(self) -> int:
        """The number of tokens."""
        ...

    def read(self, start: int, length: int) -> TokenArray:
        """Return ``length`` tokens from ``start`` on, uint16 of shape (length,). All must exist.

        Raises:
            DataError: one is outside the vocabulary.
        """
        ...


@dataclass(frozen=True)
class Split:
    """The tokens of one split, and the number of tokens in each of its files (Megatron's: by index), in their order."""

    stream: Tokens
    tokens_of_file: dict[Path, int]


@dataclass(frozen=True)
class TokenCollection:
    """A folder, a file or a pair of files with tokens.

    Attributes:
        path: as the user named it.
        format: one of ``INPUT_FORMATS``.
        tokenizer: made the ids. Files of other programs do not name it; GPT-2's is assumed.
        source: the source that a manifest of these tokens will name.
        splits: by name.
        manifest: the manifest of a folder in our format, else None.
    """

    path: Path
    format: str
    tokenizer: TokenizerRecord
    source: SourceRecord
    splits: dict[str, Split]
    manifest: Manifest | None = None

    @property
    def shards(self) -> tuple[ShardRecord, ...]:
        """Return the shards of all splits; empty for formats other than ours."""
        return self.manifest.shards if self.manifest else ()


class Concatenated:
    """Several streams as one."""

    def __init__(self, streams: Sequence[Tokens]) -> None:
        self._streams = streams
        self._starts = [0, *accumulate(stream.tokens for stream in streams)]
        self.tokens = self._starts[-1]

    def read(self, start: int, length: int) -> TokenArray:
        assert start >= 0 and length >= 0 and start + length <= self.tokens
        pieces = [np.empty(0, dtype=np.uint16)]
        index = bisect_right(self._starts, start) - 1
        while length:
            offset = start - self._starts[index]
            piece = self._streams[index].read(offset, min(length, self._streams[index].tokens - offset))
            pieces.append(piece)
            start, length, index = start + piece.size, length - piece.size, index + 1
        return np.concatenate(pieces)


def open_foreign(
    path: Path,
    format: str,
    files: Sequence[Path],
    split_of: Mapping[str, str],
    open_file: Callable[[Path, int], Tokens],
    files_on_disk: Sequence[Path] | None = None,
) -> TokenCollection:
    """Open the files of another program, found at ``path``, as a collection.

    Args:
        split_of: splits by file name, for files whose name does not contain it.
        open_file: opens one file; also gets the size of the vocabulary.
        files_on_disk: the files that the source record counts, if they are not ``files``.

    Raises:
        DataError: a file is damaged, or its split is unknown.
    """
    tokenizer = gpt2_tokenizer_record()
    splits = {}
    for split, members in _group_by_split(files, split_of).items():
        streams = {file: open_file(file, tokenizer.vocab_size) for file in members}
        tokens_of_file = {file: stream.tokens for file, stream in streams.items()}
        splits[split] = Split(Concatenated(list(streams.values())), tokens_of_file)
    counted = files_on_disk or files
    size = sum(file.stat().st_size for file in counted)
    source = SourceRecord(format, {"input": path.as_posix(), "files": len(counted), "bytes": size})
    return TokenCollection(path, format, tokenizer, source, splits)


def map_file(path: Path) -> pa.Buffer:
    """Memory-map the bytes of a file, which may be empty.

    Raises:
        DataError: it is missing or cannot be read.
    """
    with one_line_read_errors(path):
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, "", str(path))
        return map_bytes(path) if path.stat().st_size else pa.py_buffer(b"")


def require_split_name(name: str, place: str) -> None:
    """Check that a split's name can be part of a file name.

    Raises:
        DataError: it cannot; ``place`` says where it was found.
    """
    if not _SPLIT_NAME.fullmatch(name):
        raise DataError(f"{place}: {name!r} is not a name for a split; use letters, digits and . _ -")


def _group_by_split(paths: Sequence[Path], split_of: Mapping[str, str]) -> dict[str, list[Path]]:
    """Return the files by split, in their order, training first.

    A file's split is the one that ``split_of`` gives for its name (with or without the suffix), otherwise the last of
    the words train, val, valid, validation, test in its name. A single file without such a word is for training.

    Raises:
        DataError: the split of a file is unknown, or ``split_of`` names a file that does not exist.
    """
    for name, split in split_of.items():
        require_split_name(split, f"--split-of {name}={split}")
        if name not in {known for path in paths for known in (path.name, path.stem)}:
            names = [path.name for path in paths]
            listed = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            raise DataError(f"--split-of {name}={split}: this file does not exist; the files are {listed}")
    groups: dict[str, list[Path]] = {}
    for path in paths:
        words = [_SPLIT_WORDS[word] for word in re.split(r"[^a-z]+", path.stem.lower()) if word in _SPLIT_WORDS]
        named = split_of.get(path.name) or split_of.get(path.stem) or (words[-1] if words else None)
        if named is None and len(paths) > 1:
            raise DataError(
                f"{path}: its name does not tell its split; add --split-of {path.name}={TRAIN_SPLIT} (or {VAL_SPLIT})"
            )
        groups.setdefault(named or TRAIN_SPLIT, []).append(path)
    return dict(sorted(groups.items(), key=lambda group: group[0] != TRAIN_SPLIT))
