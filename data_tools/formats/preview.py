"""The first documents of a split as text."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np

from data_tools.arrays import TokenArray
from data_tools.errors import DataError
from data_tools.formats.collection import TokenCollection, Tokens
from data_tools.shards.contents import gpt2_tokenizer_record
from data_tools.tokenizer import load_tokenizer

_READ_TOKENS = 1 << 16
_LARGEST_CHARACTER_BYTES = 4


@dataclass(frozen=True)
class DocumentPreview:
    """A document: how many tokens it has, without its ``END_OF_TEXT``, and how its text begins."""

    tokens: int
    text: str
    is_cut: bool


def first_documents(
    collection: TokenCollection, split: str, *, documents: int, characters: int
) -> Iterator[DocumentPreview]:
    """The first documents of a split, decoded.

    What ``END_OF_TEXT`` divides is a document, wherever the format puts it: before each, or behind each.

    Args:
        collection: from ``open_collection``.
        split: of the collection.
        documents: how many at most.
        characters: of each one's text at most.

    Raises:
        DataError: there is no such split, its ids are not GPT-2's, or a token is outside the vocabulary.
    """
    if split not in collection.splits:
        raise DataError(f"{collection.path} has no split {split!r}; it has {', '.join(collection.splits) or 'none'}")
    if collection.tokenizer != gpt2_tokenizer_record():
        raise DataError(
            f"{collection.path} is of the tokenizer {collection.tokenizer.name!r}; only gpt2 can be decoded"
        )
    # A character takes at most so many tokens; the one that may be cut in two comes on top.
    kept_tokens = _LARGEST_CHARACTER_BYTES * (characters + 1)
    found = _split_documents(collection.splits[split].stream, collection.tokenizer.end_of_text, kept_tokens)
    return (_preview(tokens, beginning, characters) for tokens, beginning in islice(found, documents))


def _preview(tokens: int, beginning: TokenArray, characters: int) -> DocumentPreview:
    text = load_tokenizer().decode(beginning)
    return DocumentPreview(tokens, text[:characters], is_cut=len(text) > characters or beginning.size < tokens)


def _split_documents(stream: Tokens, end_of_text: int, kept_tokens: int) -> Iterator[tuple[int, TokenArray]]:
    """The size of each document and its first tokens."""
    size = 0
    kept: list[TokenArray] = []
    for start in range(0, stream.tokens, _READ_TOKENS):
        tokens = stream.read(start, min(_READ_TOKENS, stream.tokens - start))
        ends = np.flatnonzero(tokens == end_of_text)
        for number, piece in enumerate(np.split(tokens, ends)):
            if number:
                # An END_OF_TEXT at the very beginning ends nothing.
                if size or start + int(ends[number - 1]):
                    yield size, np.concatenate([*kept, tokens[:0]])
                size, kept, piece = 0, [], piece[1:]
            kept.append(piece[: max(0, kept_tokens - size)])
            size += piece.size
    if size:
        yield size, np.concatenate(kept)
