"""The indexed data sets of Megatron-LM and gpt-neox: tokens in ``X.bin``, where documents begin in ``X.idx``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from data_tools.arrays import CountArray, TokenArray
from data_tools.errors import DataError
from data_tools.formats.collection import Concatenated, Split, TokenCollection, TokenFile, group_by_split, source_record
from data_tools.formats.mapping import map_whole
from data_tools.formats.megatron_index import MegatronIndex, read_index
from data_tools.shards.contents import gpt2_tokenizer_record, require_in_vocabulary
from data_tools.tokenizer import END_OF_TEXT

MEGATRON = "megatron"
# Documents that are laid out in one go, so that memory does not grow with their number.
BLOCK_DOCUMENTS = 1 << 16


def open_megatron(path: Path, indices: Sequence[Path], split_of: Mapping[str, str]) -> TokenCollection:
    """Pairs of ``.idx`` and ``.bin``, in the order of their names.

    Raises:
        DataError: a file is damaged, missing, of tokens of another type, or its split is unknown.
    """
    tokenizer = gpt2_tokenizer_record()
    splits = {}
    for split, members in group_by_split(indices, split_of).items():
        streams = [MegatronTokens(index, tokenizer.vocab_size) for index in members]
        described = tuple(TokenFile(stream.path, stream.path.stat().st_size, stream.tokens) for stream in streams)
        splits[split] = Split(Concatenated(streams), described)
    files = [file for index in indices for file in (index, tokens_file_of(index))]
    return TokenCollection(path, MEGATRON, tokenizer, source_record(path, MEGATRON, files), splits)


def tokens_file_of(index: Path) -> Path:
    """The file with the tokens of an index."""
    return index.with_suffix(".bin")


class MegatronTokens:
    """The documents of one pair of files as a stream in our order: ``END_OF_TEXT`` before each document.

    One ``END_OF_TEXT`` at the end of a document, where ``--append-eod`` puts it, is dropped: the one before the next
    document says the same.

    Attributes:
        path: of the file with the tokens.
        tokens: of the stream, an ``END_OF_TEXT`` for each document included.
    """

    def __init__(self, index: Path, vocab_size: int) -> None:
        """Open the pair; the whole index and the last token of each document are looked at.

        Raises:
            DataError: a file is missing, damaged, or of tokens of another type.
        """
        self.path = tokens_file_of(index)
        self._vocab_size = vocab_size
        self._index = read_index(index)
        self._text = _map_tokens(self.path, self._index)
        self._blocks = range(0, self._index.documents, BLOCK_DOCUMENTS)
        ends = np.cumsum([int(_lengths(*self._documents(block)).sum()) for block in self._blocks], dtype=np.int64)
        self._block_ends = ends
        self.tokens = int(ends[-1]) if ends.size else 0

    def read(self, start: int, length: int) -> TokenArray:
        """As in ``data_tools.formats.collection.Tokens``; the error names the file."""
        assert start >= 0 and length >= 0 and start + length <= self.tokens
        tokens = np.empty(length, dtype=np.uint16)
        filled = 0
        while filled < length:
            block = int(np.searchsorted(self._block_ends, start + filled, side="right"))
            block_start = int(self._block_ends[block - 1]) if block else 0
            piece = tokens[filled : filled + int(self._block_ends[block]) - start - filled]
            self._lay_out(piece, self._blocks[block], start + filled - block_start)
            filled += piece.size
        return tokens

    def _lay_out(self, tokens: TokenArray, block: int, start: int) -> None:
        """Fill ``tokens`` with what the documents of a block give from ``start`` on."""
        text_starts, text_stops = self._documents(block)
        lengths = _lengths(text_starts, text_stops)
        # Where each document's END_OF_TEXT stands in ``tokens``; of the first that has a part in it, maybe before.
        separators = np.cumsum(lengths) - lengths - start
        first = int(np.searchsorted(separators, 0, side="right")) - 1
        stop = int(np.searchsorted(separators, tokens.size))
        separators, text_starts, text_stops = separators[first:stop], text_starts[first:stop], text_stops[first:stop]
        text = self._text_of(
            np.maximum(text_starts, text_starts - separators - 1),
            np.minimum(text_stops, text_starts - separators - 1 + tokens.size),
        )
        is_text = np.ones(tokens.size, dtype=np.bool_)
        is_text[separators[separators >= 0]] = False
        tokens[is_text] = text
        tokens[~is_text] = END_OF_TEXT

    def _text_of(self, starts: CountArray, stops: CountArray) -> npt.NDArray[np.integer[Any]]:
        """The text between starts and stops that follow each other, without the ``END_OF_TEXT`` in the gaps."""
        begin, end = int(starts[0]), int(stops[-1])
        text = self._text[begin:end]
        require_in_vocabulary(text, self._vocab_size, self.path)
        gaps = stops[:-1][stops[:-1] < starts[1:]]
        return np.delete(text, gaps - begin)

    def _documents(self, block: int) -> tuple[CountArray, CountArray]:
        """Where the texts of a block's documents start and stop in the file, each int64 of shape (documents,)."""
        boundaries = self._index.text_starts(block, min(block + BLOCK_DOCUMENTS, self._index.documents) + 1)
        starts, ends = boundaries[:-1], boundaries[1:]
        is_separated = np.zeros(starts.size, dtype=np.bool_)
        holds_tokens = ends > starts
        is_separated[holds_tokens] = self._text[ends[holds_tokens] - 1] == END_OF_TEXT
        return starts, ends - is_separated


def _map_tokens(path: Path, index: MegatronIndex) -> npt.NDArray[np.integer[Any]]:
    content = map_whole(path)
    if content.size != index.tokens * index.dtype.itemsize:
        raise DataError(
            f"{path} has {content.size} bytes, its index accounts for {index.tokens * index.dtype.itemsize} "
            f"({index.tokens} tokens of {index.dtype.name})"
        )
    return np.frombuffer(content, index.dtype) if content.size else np.empty(0, index.dtype)


def _lengths(text_starts: CountArray, text_stops: CountArray) -> CountArray:
    """Tokens of documents with the ``END_OF_TEXT`` before each."""
    return text_stops - text_starts + 1
