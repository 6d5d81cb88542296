"""nanoGPT's and llm.c's files: tokens one after the other, with a header or without."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from data_tools.arrays import TokenArray
from data_tools.errors import DataError
from data_tools.formats.collection import Concatenated, Split, TokenCollection, TokenFile, group_by_split, source_record
from data_tools.formats.mapping import map_whole
from data_tools.shards.contents import gpt2_tokenizer_record, require_in_vocabulary
from data_tools.shards.llmc import llmc_tokens

LLMC = "llmc"
NANOGPT = "nanogpt"
NANOGPT_NAMES = ("train.bin", "val.bin")
# nanoGPT puts it beside data of a vocabulary of its own. It is a pickle, and never opened.
_OWN_VOCABULARY = "meta.pkl"


def open_llmc(path: Path, files: Sequence[Path], split_of: Mapping[str, str]) -> TokenCollection:
    """Shards of llm.c or modded-nanogpt; their order is that of their names.

    Raises:
        DataError: a file is damaged, or its split is unknown.
    """
    return _open_flat(path, LLMC, files, split_of, map_llmc_file)


def open_nanogpt(path: Path, files: Sequence[Path], split_of: Mapping[str, str]) -> TokenCollection:
    """Raw little-endian uint16 tokens as nanoGPT's ``prepare.py`` writes them: ``train.bin``, ``val.bin``.

    Tokens stay exactly as they are: nanoGPT's ``<|endoftext|>`` behind each document remains there.

    Raises:
        DataError: a file is damaged, of another vocabulary, or its split is unknown.
    """
    for folder in dict.fromkeys(file.parent for file in files):
        if (folder / _OWN_VOCABULARY).exists():
            raise DataError(
                f"{folder / _OWN_VOCABULARY} says that the ids are of a vocabulary of their own "
                "(nanoGPT's characters), not of GPT-2's; tokenize the text with launch/tokenize_corpus.py"
            )
    return _open_flat(path, NANOGPT, files, split_of, _map_raw)


def map_llmc_file(path: Path) -> TokenArray:
    """Memory-map the tokens of a shard of llm.c.

    Raises:
        DataError: it is damaged or cannot be read.
    """
    try:
        return llmc_tokens(map_whole(path))
    except ValueError as error:
        raise DataError(f"{path} is no whole shard of llm.c: {error}") from error


def _map_raw(path: Path) -> TokenArray:
    content = map_whole(path)
    if content.size % 2:
        raise DataError(f"{path} is no whole file of uint16 tokens: it has an odd number of bytes, {content.size}")
    return np.frombuffer(content, dtype="<u2") if content.size else np.empty(0, dtype=np.uint16)


class _MappedTokens:
    """The tokens of one mapped file."""

    def __init__(self, path: Path, tokens: TokenArray, vocab_size: int) -> None:
        self._path = path
        self._tokens = tokens
        self._vocab_size = vocab_size
        self.tokens = tokens.size

    def read(self, start: int, length: int) -> TokenArray:
        tokens = self._tokens[start : start + length]
        require_in_vocabulary(tokens, self._vocab_size, self._path)
        return tokens


def _open_flat(
    path: Path,
    format: str,
    files: Sequence[Path],
    split_of: Mapping[str, str],
    map_file: Callable[[Path], TokenArray],
) -> TokenCollection:
    tokenizer = gpt2_tokenizer_record()
    splits = {}
    for split, members in group_by_split(files, split_of).items():
        streams = [_MappedTokens(file, map_file(file), tokenizer.vocab_size) for file in members]
        sizes = zip(members, streams, strict=True)
        described = tuple(TokenFile(file, file.stat().st_size, stream.tokens) for file, stream in sizes)
        splits[split] = Split(Concatenated(streams), described)
    return TokenCollection(path, format, tokenizer, source_record(path, format, files), splits)
