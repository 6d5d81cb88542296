"""Tokens of any format: splits, each one stream that is read anywhere."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from data_tools.arrays import TokenArray
from data_tools.errors import DataError
from data_tools.shards import TRAIN_SPLIT, VAL_SPLIT, Manifest, ShardRecord, SourceRecord, TokenizerRecord

_SPLIT_WORDS = {
    "train": TRAIN_SPLIT,
    "val": VAL_SPLIT,
    "valid": VAL_SPLIT,
    "validation": VAL_SPLIT,
    "test": "test",
}
_SPLIT_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


class Tokens(Protocol):
    """A stream of tokens of known length, read anywhere; ``data_tools.shards.TokenStream`` is one."""

    @property
    def tokens(self) -> int:
        """How many there are."""
        ...

    def read(self, start: int, length: int) -> TokenArray:
        """Tokens ``start`` to ``start + length``, uint16 of shape (length,); all must exist.

        Raises:
            DataError: one is outside the vocabulary.
        """
        ...


@dataclass(frozen=True)
class TokenFile:
    """One file of a split: what it takes on the disk, and what is known of its contents without reading them."""

    path: Path
    bytes: int
    tokens: int


@dataclass(frozen=True)
class Split:
    """The tokens of one split, and the files that hold them in the order of the tokens."""

    stream: Tokens
    files: tuple[TokenFile, ...]


@dataclass(frozen=True)
class TokenCollection:
    """A folder, a file or a pair of files with tokens.

    Attributes:
        path: as the user named it.
        format: one of ``INPUT_FORMATS``.
        tokenizer: whose ids these are; foreign files do not say, they are taken for GPT-2's.
        source: where a manifest will say that its tokens came from.
        splits: by name.
        manifest: of a folder of ours, else None.
    """

    path: Path
    format: str
    tokenizer: TokenizerRecord
    source: SourceRecord
    splits: dict[str, Split]
    manifest: Manifest | None = None

    def records_of(self, split: str) -> tuple[ShardRecord, ...]:
        """The shards of a split of a folder of ours; none for other formats."""
        return self.manifest.shards_of(split) if self.manifest else ()


class Concatenated:
    """Streams end to end as one."""

    def __init__(self, streams: Sequence[Tokens]) -> None:
        self._streams = streams
        self._starts = [0, *accumulate(stream.tokens for stream in streams)]
        self.tokens = self._starts[-1]

    def read(self, start: int, length: int) -> TokenArray:
        """As in ``Tokens``."""
        assert start >= 0 and length >= 0 and start + length <= self.tokens
        pieces = [np.empty(0, dtype=np.uint16)]
        index = bisect_right(self._starts, start) - 1
        while length:
            offset = start - self._starts[index]
            piece = self._streams[index].read(offset, min(length, self._streams[index].tokens - offset))
            pieces.append(piece)
            start, length, index = start + piece.size, length - piece.size, index + 1
        return np.concatenate(pieces)


def source_record(path: Path, format: str, files: Sequence[Path]) -> SourceRecord:
    """Where imported tokens came from, for their manifest."""
    size = sum(file.stat().st_size for file in files)
    options: dict[str, Any] = {"input": path.as_posix(), "files": len(files), "bytes": size}
    return SourceRecord(format, options)


def conversion_record(format: str) -> dict[str, Any]:
    """When tokens of a format were converted, for the manifest."""
    return {"converted_at": datetime.now(timezone.utc).isoformat(timespec="seconds"), "converted_from": format}


def expect_split_name(name: str, place: str) -> None:
    """Check that a split's name can stand in a file name.

    Raises:
        DataError: it cannot; ``place`` says where it was found.
    """
    if not _SPLIT_NAME.fullmatch(name):
        raise DataError(f"{place}: {name!r} is no name of a split; it may have letters, digits and . _ -")


def group_by_split(paths: Sequence[Path], split_of: Mapping[str, str]) -> dict[str, list[Path]]:
    """Files by split, in their order; training first.

    The split of a file is what ``split_of`` says of its name (with or without the ending), else the last of the
    words train, val, valid, validation, test in it. A single file that has none of them is for training.

    Raises:
        DataError: the split of a file is unknown, or ``split_of`` names a file that is not there.
    """
    for name, split in split_of.items():
        expect_split_name(split, f"--split-of {name}={split}")
        if name not in {known for path in paths for known in (path.name, path.stem)}:
            raise DataError(f"--split-of {name}={split}: there is no such file; there are {_listed(paths)}")
    groups: dict[str, list[Path]] = {}
    for path in paths:
        told = split_of.get(path.name) or split_of.get(path.stem) or _split_in_name(path)
        if told is None and len(paths) > 1:
            raise DataError(
                f"{path}: its name does not tell its split; add --split-of {path.name}={TRAIN_SPLIT} (or {VAL_SPLIT})"
            )
        groups.setdefault(told or TRAIN_SPLIT, []).append(path)
    return dict(sorted(groups.items(), key=lambda group: group[0] != TRAIN_SPLIT))


def _split_in_name(path: Path) -> str | None:
    words = [_SPLIT_WORDS[word] for word in re.split(r"[^a-z]+", path.stem.lower()) if word in _SPLIT_WORDS]
    return words[-1] if words else None


def _listed(paths: Sequence[Path]) -> str:
    names = [path.name for path in paths]
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
