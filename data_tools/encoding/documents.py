"""Define documents and encode them. A document is a text or a dialogue.

A token is *scored* if its prediction counts in the loss. In a dialogue, usually only the answers are scored. In a text,
all tokens are scored.
"""

import hashlib
import re
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from data_tools.arrays import MaskArray, TokenArray
from data_tools.encoding.encoders import Encoder
from data_tools.tokenizer import to_utf8
from data_tools.vocabulary import END_OF_TEXT


@dataclass(frozen=True)
class Dialogue:
    """An instruction with its answer, or a chat.

    ``segments`` are pairs (text, is_scored), in order. ``is_scored`` says whether the text counts in the loss.
    """

    segments: tuple[tuple[str, bool], ...]

    @property
    def text(self) -> str:
        """Return the segments as one text."""
        return "".join(text for text, _ in self.segments)

    def __bool__(self) -> bool:
        """Return whether the dialogue has text, as for a ``str``."""
        return any(text for text, _ in self.segments)


Document = str | Dialogue

_BEGINNING = np.array([END_OF_TEXT], dtype=np.uint16)

# The longest beginning of a text that ends between a word and a blank.
_WHOLE_WORDS = re.compile(r".*\S(?=[ \n])", re.DOTALL)


class EncodedDocument(NamedTuple):
    """The tokens of a document.

    Attributes:
        tokens: uint16 of shape (tokens,). The first token is ``END_OF_TEXT``.
        scored: bool of shape (tokens,), True for tokens that count in the loss. None means all tokens.
    """

    tokens: TokenArray
    scored: MaskArray | None


def text_of(document: Document) -> str:
    """Return the text of a document."""
    return document if isinstance(document, str) else document.text


def utf8_of(document: Document) -> bytes:
    """Return the text of a document in UTF-8. Lone surrogates become U+FFFD, as in the encoders."""
    return to_utf8(text_of(document))


def fingerprint_of(document: Document, utf8: bytes) -> bytes:
    """Return the first 16 bytes of the SHA-256 hash of a document. Equal documents have equal fingerprints.

    ``utf8`` is the result of ``utf8_of``.
    """
    digest = hashlib.sha256(utf8)
    if isinstance(document, Dialogue):
        digest.update(repr([(len(text), scored) for text, scored in document.segments]).encode())
    return digest.digest()[:16]


def encode_document(encoder: Encoder, document: Document) -> EncodedDocument:
    """Return the tokens of a document, with ``END_OF_TEXT`` before its text.

    In a dialogue, this ``END_OF_TEXT`` counts in the loss. In the shards, it follows the last answer of the previous
    dialogue. The model thus learns to end an answer with ``END_OF_TEXT``.
    """
    if isinstance(document, str):
        return EncodedDocument(np.concatenate((_BEGINNING, encoder.encode(document))), None)
    pieces = [_BEGINNING, *(encoder.encode(text) for text, _ in document.segments)]
    flags = [True, *(is_scored for _, is_scored in document.segments)]
    return EncodedDocument(np.concatenate(pieces), np.repeat(flags, [piece.size for piece in pieces]))


def beginning_of(document: Document, characters: int) -> Document:
    """Return a beginning of a text with at most ``characters`` characters. Its tokens are the first tokens of the text.

    The cut is between a word and a blank, because no token continues there. A text without such a place and a
    ``Dialogue`` are returned whole.
    """
    if isinstance(document, Dialogue) or len(document) <= characters:
        return document
    found = _WHOLE_WORDS.match(document, 0, characters)
    return found.group() if found else document
