"""Define the encoders, which convert text to tokens. All encoders return the same tokens.

gigatoken is several times as fast as tiktoken.
"""

import functools
import importlib.metadata
import importlib.util
import logging
import sys
import tempfile
import unicodedata
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from data_tools.arrays import TokenArray
from data_tools.errors import DataError, one_line_write_errors
from data_tools.tokenizer import load_tokenizer, to_utf8

log = logging.getLogger(__name__)

REFERENCE_ENCODER = "tiktoken"

# Ranges of code points that are letters or numbers for gigatoken 0.10, but not for tiktoken 0.14.
_NEW_IN_UNICODE_17 = (
    *((0x88F, 0x88F), (0xC5C, 0xC5C), (0xCDC, 0xCDC), (0xA7CE, 0xA7CF), (0xA7D2, 0xA7D2), (0xA7D4, 0xA7D4)),
    *((0xA7F1, 0xA7F1), (0x10940, 0x1095F), (0x10EC5, 0x10EC7), (0x11DB0, 0x11DEF), (0x16EA0, 0x16EDF)),
    *((0x16FF2, 0x16FF6), (0x187F8, 0x187FF), (0x18D09, 0x18D1E), (0x18D80, 0x18DFF), (0x1E6C0, 0x1E6FF)),
    *((0x2B73A, 0x2B73F), (0x2CEA2, 0x2CEAD), (0x323B0, 0x3347F)),
)


_ASCII = bytes(range(128))
_UNKNOWN, _OLD, _NEW = range(3)  # the kinds of characters


class Encoder(Protocol):
    """The interface of an encoder. ``data_tools.tokenizer.Tokenizer`` also implements it."""

    def encode(self, text: str) -> TokenArray:
        """Return the tokens of a text, uint16 of shape (tokens,).

        The string ``<|endoftext|>`` is ordinary text. Lone surrogates become U+FFFD.
        """
        ...


class GigatokenEncoder:
    """An encoder that uses gigatoken. If a text has new characters (see ``has_new_characters``), it uses tiktoken.

    The two packages use different versions of Unicode, so they may encode new characters differently.
    """

    def __init__(self) -> None:
        self._reference = load_tokenizer()
        # Imported here because gigatoken does not exist for every platform.
        import gigatoken

        # gigatoken reads the vocabulary only from a file. It gets no special tokens: they are ordinary text here.
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "gpt2.tiktoken")
            with one_line_write_errors(path):
                path.write_bytes(self._reference.rank_file)
            self._encode = gigatoken.Tokenizer.from_tiktoken(path, "gpt2", {}).backend.encode

    def encode(self, text: str) -> TokenArray:
        if text.isascii():
            return self._encode(text).astype(np.uint16)
        utf8 = to_utf8(text)
        if has_new_characters(utf8):
            return self._reference.encode(text)
        return self._encode(utf8).astype(np.uint16)


def has_new_characters(utf8: bytes) -> bool:
    """Return whether a text has a character that Unicode 17 added, or that the module ``unicodedata`` does not know."""
    others = utf8.translate(None, _ASCII).decode()  # most characters are ASCII, and bytes.translate is fast
    points = np.frombuffer(others.encode("utf-32-le"), dtype="<u4")
    kinds = _kinds_of_characters()[points]
    if not kinds.all():
        _find_kinds(np.unique(points[kinds == _UNKNOWN]))
        kinds = _kinds_of_characters()[points]
    return bool((kinds == _NEW).any())


@functools.cache
def _kinds_of_characters() -> npt.NDArray[np.uint8]:
    """Return the kind of each code point: ``_OLD``, ``_NEW`` or ``_UNKNOWN``. ``_find_kinds`` replaces ``_UNKNOWN``."""
    kinds = np.full(sys.maxunicode + 1, _UNKNOWN, dtype=np.uint8)
    for first, last in _NEW_IN_UNICODE_17:
        kinds[first : last + 1] = _NEW
    return kinds


def _find_kinds(points: Iterable[int]) -> None:
    """Mark the given code points as ``_OLD`` or ``_NEW``. For all code points, this would take a tenth of a second."""
    kinds = _kinds_of_characters()
    for point in points:
        kinds[point] = _NEW if unicodedata.category(chr(point)) == "Cn" else _OLD


def choose_encoder(name: str) -> str:
    """Return the name of the encoder to use. ``auto`` means gigatoken if it is installed, otherwise tiktoken.

    Raises:
        DataError: ``name`` is ``gigatoken``, but gigatoken is not installed.
    """
    if name == "tiktoken":
        return name
    if importlib.util.find_spec("gigatoken") is not None:
        return "gigatoken"
    if name == "gigatoken":
        raise DataError("--encoder gigatoken: it is not installed; pip install gigatoken, or use --encoder tiktoken")
    log.info("gigatoken is not installed: encoding with tiktoken, which is several times slower")
    return "tiktoken"


@functools.cache
def load_encoder(name: str) -> Encoder:
    """Return the encoder ``gigatoken`` or ``tiktoken``. It is loaded only once per process."""
    return GigatokenEncoder() if name == "gigatoken" else load_tokenizer()


def encoder_version(name: str) -> str:
    """Return the name and the version of an encoder."""
    return f"{name} {importlib.metadata.version(name)}"
