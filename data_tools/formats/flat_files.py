"""The files of nanoGPT and llm.c: tokens one after the other, without or with a header."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from data_tools.arrays import TokenArray
from data_tools.errors import DataError
from data_tools.formats.collection import TokenCollection, map_file, open_foreign
from data_tools.shards.contents import require_in_vocabulary
from data_tools.shards.llmc import llmc_tokens

LLMC = "llmc"
NANOGPT = "nanogpt"
NANOGPT_NAMES = ("train.bin", "val.bin")
# nanoGPT writes this pickle beside data with a vocabulary of its own. It is never opened.
_OWN_VOCABULARY = "meta.pkl"


class _MappedTokens:
    """The tokens of one mapped file."""

    def __init__(self, path: Path, tokens: TokenArray, vocab_size: int) -> None:
        self._path = path
        self.tokens = tokens.size
        self._tokens = tokens
        self._vocab_size = vocab_size

    def read(self, start: int, length: int) -> TokenArray:
        tokens = self._tokens[start : start + length]
        require_in_vocabulary(tokens, self._vocab_size, self._path)
        return tokens


def open_llmc(path: Path, files: Sequence[Path], split_of: Mapping[str, str]) -> TokenCollection:
    """Open shards of llm.c or modded-nanogpt.

    Raises:
        DataError: a file is damaged, or its split is unknown.
    """

    def open_file(file: Path, vocab_size: int) -> _MappedTokens:
        return _MappedTokens(file, map_llmc_file(file), vocab_size)

    return open_foreign(path, LLMC, files, split_of, open_file)


def open_nanogpt(path: Path, files: Sequence[Path], split_of: Mapping[str, str]) -> TokenCollection:
    """Open bare little-endian uint16 tokens as nanoGPT's ``prepare.py`` writes them: ``train.bin``, ``val.bin``.

    Tokens are not changed: nanoGPT's ``<|endoftext|>`` stays after each document.

    Raises:
        DataError: a file is damaged or has another vocabulary, or its split is unknown.
    """
    for folder in dict.fromkeys(file.parent for file in files):
        if (folder / _OWN_VOCABULARY).exists():
            raise DataError(
                f"{folder / _OWN_VOCABULARY} says that the ids are of a vocabulary of their own "
                "(nanoGPT's characters), not of GPT-2's; tokenize the text with launch/tokenize_corpus.py"
            )

    def open_file(file: Path, vocab_size: int) -> _MappedTokens:
        content = map_file(file)
        if content.size % 2:
            raise DataError(
                f"{file} is not a whole file of uint16 tokens: it has an odd number of bytes, {content.size}"
            )
        tokens = np.frombuffer(content, dtype="<u2") if content.size else np.empty(0, dtype=np.uint16)
        return _MappedTokens(file, tokens, vocab_size)

    return open_foreign(path, NANOGPT, files, split_of, open_file)


def map_llmc_file(path: Path) -> TokenArray:
    """Memory-map the tokens of a shard of llm.c.

    Raises:
        DataError: it is damaged or cannot be read.
    """
    try:
        return llmc_tokens(map_file(path))
    except ValueError as error:
        raise DataError(f"{path} is not a whole shard of llm.c: {error}") from error
