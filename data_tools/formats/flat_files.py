"""Open token files of nanoGPT, llm.c and build-nanogpt: consecutive tokens, possibly after a header."""

from pathlib import Path

import numpy as np

from data_tools.arrays import TokenArray
from data_tools.errors import DataError
from data_tools.formats.collection import Tokens, map_file, require_tokens
from data_tools.shards.contents import require_in_vocabulary
from data_tools.shards.llmc import llmc_tokens
from data_tools.shards.mapping import npy_tokens
from data_tools.storage.content import describe_content
from data_tools.vocabulary import GPT2_VOCAB_SIZE

LLMC = "llmc"
NANOGPT = "nanogpt"
NPY = "npy"
NPY_SUFFIX = ".npy"
NANOGPT_NAMES = ("train.bin", "val.bin")
# nanoGPT writes this pickle into a folder of data with another vocabulary. This project never opens the pickle.
_OWN_VOCABULARY = "meta.pkl"
_HEAD_TOKENS = 1024
_FEWEST_TOKENS = 16  # fewer tokens say too little about their dtype


class _MappedTokens:
    def __init__(self, path: Path, tokens: TokenArray, vocab_size: int) -> None:
        require_tokens(path, tokens.size)
        self._path = path
        self.tokens = tokens.size
        self._tokens = tokens
        self._vocab_size = vocab_size

    def read(self, start: int, length: int) -> TokenArray:
        tokens = self._tokens[start : start + length]
        require_in_vocabulary(tokens, self._vocab_size, self._path)
        return tokens


def open_llmc_file(path: Path, vocab_size: int) -> Tokens:
    """Open a shard of llm.c or modded-nanogpt."""
    return _MappedTokens(path, map_llmc_file(path), vocab_size)


def open_nanogpt_file(path: Path, vocab_size: int) -> Tokens:
    """Open a ``train.bin`` or ``val.bin`` of nanoGPT: little-endian uint16 tokens without a header.

    nanoGPT writes ``<|endoftext|>`` after each document. Shards of this project contain ``<|endoftext|>`` before each
    document. This function does not change the order of the tokens.

    Raises:
        DataError: the tokens are not of this vocabulary, are 32 bits wide, or the number of bytes is odd.
    """
    own_vocabulary = path.parent / _OWN_VOCABULARY
    if own_vocabulary.exists() and vocab_size == GPT2_VOCAB_SIZE:
        raise DataError(
            f"{own_vocabulary} says that the ids are of a vocabulary of their own "
            "(nanoGPT's characters), not of GPT-2's; tokenize the text with gpt2-pipeline tokenize, "
            "or give --vocab-size"
        )
    content = map_file(path)
    if content.size % 2:
        raise DataError(f"{path} is not a whole file of uint16 tokens: it has an odd number of bytes, {content.size}")
    tokens = np.frombuffer(content, dtype="<u2") if content.size else np.empty(0, dtype=np.uint16)
    head = tokens[:_HEAD_TOKENS]
    if head.size >= _FEWEST_TOKENS and head[::2].any() and not head[1::2].any():
        raise DataError(
            f"{path} holds 32-bit tokens, because every second uint16 is 0; nanoGPT's files hold uint16: "
            "write the tokens again as np.uint16"
        )
    return _MappedTokens(path, tokens, vocab_size)


def map_llmc_file(path: Path) -> TokenArray:
    """Return the tokens of a shard of llm.c as a memory map."""
    try:
        return llmc_tokens(map_file(path))
    except ValueError as error:
        raise DataError(f"{path} {describe_content(path) or f'is not a whole shard of llm.c: {error}'}") from error


def open_npy_file(path: Path, vocab_size: int) -> Tokens:
    """Open a shard of build-nanogpt: a one-dimensional uint16 array in a ``.npy`` file."""
    return _MappedTokens(path, map_npy_file(path), vocab_size)


def map_npy_file(path: Path) -> TokenArray:
    """Return the tokens of a shard of build-nanogpt as a memory map."""
    try:
        return npy_tokens(map_file(path))
    except ValueError as error:
        raise DataError(
            f"{path} {describe_content(path, 'npy') or f'is not a whole array of uint16 tokens: {error}'}"
        ) from error


def is_npy(path: Path) -> bool:
    """Return whether a file begins like a ``.npy`` file. Raise OSError if it cannot be read."""
    magic = np.lib.format.MAGIC_PREFIX
    with open(path, "rb") as file:
        return file.read(len(magic)) == magic
