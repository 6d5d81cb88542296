"""Represent token files of any format as splits. Each split is a stream of tokens with random access."""

import errno
import re
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Protocol

import numpy as np
import pyarrow as pa

from data_tools.arrays import TokenArray
from data_tools.errors import DataError, one_line_read_errors
from data_tools.shards.manifest import Manifest, ShardRecord, SourceRecord, TokenizerRecord
from data_tools.shards.mapping import map_bytes

FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


class Tokens(Protocol):
    """The interface of a stream of tokens with a known length."""

    @property
    def tokens(self) -> int: ...

    def read(self, start: int, length: int) -> TokenArray:
        """Return ``length`` tokens from index ``start`` on, uint16 of shape (length,). The range must exist.

        Raises:
            DataError: a token is outside the vocabulary.
        """
        ...


@dataclass(frozen=True)
class Split:
    """The tokens of one split, and the number of tokens per file. A pair of Megatron's files counts as one file."""

    stream: Tokens
    tokens_of_file: dict[Path, int]


@dataclass(frozen=True)
class TokenCollection:
    """The tokens in a folder, in a file, or in a pair of Megatron's files (``.bin`` and ``.idx``).

    Attributes:
        format: one of ``INPUT_FORMATS``.
        tokenizer: GPT-2's if there is no manifest.
        source: the origin of the tokens.
        manifest: None if another program wrote the files.
    """

    path: Path
    format: str
    tokenizer: TokenizerRecord
    source: SourceRecord
    splits: dict[str, Split]
    manifest: Manifest | None = None

    @property
    def shards(self) -> tuple[ShardRecord, ...]:
        """Return the manifest's records of all shards. Without a manifest, return an empty tuple."""
        return self.manifest.shards if self.manifest else ()


class Concatenated:
    """A stream of tokens that joins several streams."""

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


def map_file(path: Path) -> pa.Buffer:
    """Memory-map a file and return its bytes. The file may be empty."""
    with one_line_read_errors(path):
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, "", str(path))
        return map_bytes(path) if path.stat().st_size else pa.py_buffer(b"")


def require_tokens(path: Path, tokens: int) -> None:
    """Raise DataError if a file has no tokens. The usual reason is an interrupted download."""
    if not tokens:
        size = path.stat().st_size
        raise DataError(f"{path} has no tokens ({size} bytes); copy it or make it again, or remove it")


def require_split_name(name: str, place: str) -> None:
    """Raise DataError if the name of a split is not allowed in file names."""
    if not FILE_NAME.fullmatch(name):
        raise DataError(f"{place}: {name!r} is not a name for a split; use letters, digits and . _ -")
