"""Count the documents and the bytes of text in token arrays, and check that all tokens are valid."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from data_tools.arrays import TokenArray, as_arrow
from data_tools.errors import DataError
from data_tools.shards.manifest import TokenizerRecord
from data_tools.threads import Advance, no_progress
from data_tools.tokenizer import load_tokenizer
from data_tools.vocabulary import END_OF_TEXT, GPT2_VOCAB_SIZE, TOKENIZER_NAME, VOCABULARY_SHA256

_SCAN_TOKENS = 1 << 18  # the tokens that are counted together, few enough to fit into the processor's cache


@dataclass(frozen=True)
class Contents:
    """Numbers of documents, tokens, and bytes of text in UTF-8. One ``END_OF_TEXT`` per document counts as a token."""

    documents: int = 0
    tokens: int = 0
    utf8_bytes: int = 0

    def __add__(self, other: Contents) -> Contents:
        return Contents(
            self.documents + other.documents, self.tokens + other.tokens, self.utf8_bytes + other.utf8_bytes
        )


class Vocabulary:
    """Counts the documents, tokens and bytes of text in token arrays of one tokenizer.

    Attributes:
        end_of_text: the id of the token that separates documents. It counts as 0 bytes of text.
        knows_bytes: whether the bytes of text can be counted (only for GPT-2's vocabulary).
    """

    def __init__(self, tokenizer: TokenizerRecord) -> None:
        self.size = tokenizer.vocab_size
        self.end_of_text = tokenizer.end_of_text
        self.knows_bytes = tokenizer.name == TOKENIZER_NAME and tokenizer == gpt2_tokenizer_record()
        self._byte_lengths: pa.Array | None = None  # bytes of each token by id; 0 for the last id, END_OF_TEXT
        if self.knows_bytes:
            self._byte_lengths = as_arrow(np.array([*map(len, load_tokenizer().token_bytes), 0], dtype=np.uint8))

    def count(self, tokens: TokenArray, place: object, advance: Advance = no_progress) -> Contents:
        """Count documents, tokens and bytes of text. If ``knows_bytes`` is False, the number of bytes is 0.

        Args:
            tokens: uint16 of shape (tokens,).
            advance: is regularly called with 0. It can raise an error to stop the counting.

        Raises:
            DataError: an id is outside the vocabulary. The message begins with ``place``.
        """
        import pyarrow.compute as pc  # here, because the import takes a tenth of a second and encoding does not need it

        contents = Contents()
        for start in range(0, tokens.size, _SCAN_TOKENS):
            piece = tokens[start : start + _SCAN_TOKENS]
            require_in_vocabulary(piece, self.size, place)
            utf8_bytes = 0
            if self._byte_lengths is not None:
                # Two to three times as fast as numpy, which converts 16-bit indices to 64 bits first.
                utf8_bytes = pc.sum(pc.array_take(self._byte_lengths, as_arrow(piece), boundscheck=False)).as_py()
            contents += Contents(int(np.count_nonzero(piece == self.end_of_text)), piece.size, utf8_bytes)
            advance(0)
        return contents


def require_in_vocabulary(tokens: npt.NDArray[np.integer], vocab_size: int, place: object) -> None:
    """Raise DataError if a token id is outside the vocabulary. The message begins with ``place``."""
    if tokens.size == 0:
        return
    lowest = 0 if tokens.dtype.kind == "u" else int(tokens.min())
    for token in (int(tokens.max()), lowest):
        if not 0 <= token < vocab_size:
            raise DataError(f"{place} holds token {token}, the vocabulary ends at {vocab_size - 1}")


def gpt2_tokenizer_record() -> TokenizerRecord:
    """Return the description of GPT-2's tokenizer for a manifest."""
    return TokenizerRecord(TOKENIZER_NAME, GPT2_VOCAB_SIZE, END_OF_TEXT, VOCABULARY_SHA256)
