"""Represent tokens of any format as a collection of splits. Each split is one stream with random access."""

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
    """The interface of a stream of tokens of known length. ``TokenStream`` implements this interface."""

    @property
    def tokens(self) -> int:
        """The number of tokens."""
        ...

    def read(self, start: int, length: int) -> TokenArray:
        """Return ``length`` tokens from ``start`` on, uint16 of shape (length,). The range must be in the stream.

        Raises:
            DataError: a token is outside the vocabulary.
        """
        ...


@dataclass(frozen=True)
class Split:
    """The tokens of one split, and the number of tokens in each of its files. A Megatron pair counts as one file."""

    stream: Tokens
    tokens_of_file: dict[Path, int]


@dataclass(frozen=True)
class TokenCollection:
    """A folder, a file or a pair of files with tokens.

    Attributes:
        path: the path that the user gave.
        format: one of ``INPUT_FORMATS``.
        tokenizer: the tokenizer of the tokens. For files of other programs, this is assumed to be GPT-2's tokenizer.
        source: the origin of the tokens. A manifest that is written for these tokens contains this record.
        splits: the splits by name.
        manifest: the manifest of a folder of this project, otherwise None.
    """

    path: Path
    format: str
    tokenizer: TokenizerRecord
    source: SourceRecord
    splits: dict[str, Split]
    manifest: Manifest | None = None

    @property
    def shards(self) -> tuple[ShardRecord, ...]:
        """Return the records of the shards of all splits, or an empty tuple if the format is not this project's."""
        return self.manifest.shards if self.manifest else ()


class Concatenated:
    """Several streams that are read as if they were one stream."""

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
    """Memory-map the bytes of a file. The file may be empty.

    Raises:
        DataError: the file is missing or cannot be read.
    """
    with one_line_read_errors(path):
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, "", str(path))
        return map_bytes(path) if path.stat().st_size else pa.py_buffer(b"")


def require_tokens(path: Path, tokens: int) -> None:
    """Check that a file of another program has tokens. An empty file is usually an interrupted copy or download.

    Raises:
        DataError: ``tokens``, the number of tokens, is 0.
    """
    if not tokens:
        size = path.stat().st_size
        raise DataError(f"{path} has no tokens ({size} bytes); copy it or make it again, or remove it")


def require_split_name(name: str, place: str) -> None:
    """Check that a split's name can be part of a file name.

    Raises:
        DataError: the name contains a character that is not allowed. The message begins with ``place``.
    """
    if not FILE_NAME.fullmatch(name):
        raise DataError(f"{place}: {name!r} is not a name for a split; use letters, digits and . _ -")
