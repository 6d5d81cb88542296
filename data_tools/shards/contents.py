"""What tokens amount to: documents, and bytes of text."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow.compute as pc

from data_tools.arrays import TokenArray, as_arrow
from data_tools.errors import DataError
from data_tools.shards.manifest import TokenizerRecord
from data_tools.tokenizer import END_OF_TEXT, GPT2_VOCAB_SIZE, TOKENIZER_NAME, Tokenizer, load_tokenizer

# What is worked on in one go stays in the processor's cache.
_SCAN_TOKENS = 1 << 18


@dataclass(frozen=True)
class Contents:
    """Documents (one ``END_OF_TEXT`` each) and bytes of their text in UTF-8."""

    documents: int = 0
    utf8_bytes: int = 0

    def __add__(self, other: Contents) -> Contents:
        return Contents(self.documents + other.documents, self.utf8_bytes + other.utf8_bytes)


class Vocabulary:
    """Counts what tokens of one tokenizer amount to.

    Attributes:
        size: ids are below it.
        end_of_text: the id that stands before each document; it has no bytes.
        knows_bytes: whether bytes of text can be counted, which only GPT-2's own vocabulary allows.
    """

    def __init__(self, tokenizer: TokenizerRecord) -> None:
        """Prepare to count.

        Raises:
            DataError: GPT-2's vocabulary is nowhere to be had.
        """
        self.size = tokenizer.vocab_size
        self.end_of_text = tokenizer.end_of_text
        self.knows_bytes = tokenizer.name == TOKENIZER_NAME and tokenizer == gpt2_tokenizer_record()
        self._byte_lengths = as_arrow(token_byte_lengths(load_tokenizer())) if self.knows_bytes else None

    def count(self, tokens: TokenArray, place: object) -> Contents:
        """Documents and bytes of a run of tokens, 0 bytes where they cannot be counted.

        Args:
            tokens: uint16 of shape (tokens,).
            place: where they stood, for the message.

        Raises:
            DataError: an id is outside the vocabulary.
        """
        contents = Contents()
        for start in range(0, tokens.size, _SCAN_TOKENS):
            contents += self._count_piece(tokens[start : start + _SCAN_TOKENS], place)
        return contents

    def _count_piece(self, tokens: TokenArray, place: object) -> Contents:
        expect_in_vocabulary(tokens, self.size, place)
        documents = int(np.count_nonzero(tokens == self.end_of_text))
        if self._byte_lengths is None:
            return Contents(documents)
        # Arrow looks 16-bit indices up as they are, which numpy widens to 64 bits first: two to three times faster.
        lengths = pc.array_take(self._byte_lengths, as_arrow(tokens), boundscheck=False)
        return Contents(documents, pc.sum(lengths).as_py())


def expect_in_vocabulary(tokens: npt.NDArray[np.integer], vocab_size: int, place: object) -> None:
    """Look at every id of a run of tokens of any integer type.

    Raises:
        DataError: one is outside the vocabulary; ``place`` says where.
    """
    if tokens.size == 0:
        return
    for token in (int(tokens.max()), int(tokens.min())):
        if not 0 <= token < vocab_size:
            raise DataError(f"{place} holds token {token}, the vocabulary ends at {vocab_size - 1}")


def gpt2_tokenizer_record() -> TokenizerRecord:
    """The record of GPT-2's own vocabulary.

    Raises:
        DataError: it is nowhere to be had.
    """
    return TokenizerRecord(TOKENIZER_NAME, GPT2_VOCAB_SIZE, END_OF_TEXT, load_tokenizer().vocabulary_sha256())


def token_byte_lengths(tokenizer: Tokenizer) -> npt.NDArray[np.uint8]:
    """Bytes of text that each id stands for: uint8 of shape (vocab_size,), 0 for ``END_OF_TEXT``."""
    return np.array([*map(len, tokenizer.token_bytes), 0], dtype=np.uint8)
