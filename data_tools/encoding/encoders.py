"""Define the encoders, which convert text to tokens.

All encoders return the same tokens. gigatoken is several times as fast as tiktoken.
"""

import functools
import importlib.metadata
import importlib.util
import logging
import sys
import tempfile
import unicodedata
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from data_tools.arrays import TokenArray
from data_tools.errors import DataError, one_line_write_errors
from data_tools.tokenizer import load_tokenizer, replace_lone_surrogates

log = logging.getLogger(__name__)

REFERENCE_ENCODER = "tiktoken"

# The ranges of code points with assigned characters. Only private-use code points follow the last range.
_ASSIGNED_PLANES = ((0, 0x40000), (0xE0000, 0xF0000))
# The first and last code points of ranges that gigatoken 0.10 treats as letters or numbers, but tiktoken 0.14 does not.
_NEW_IN_UNICODE_17 = (
    *((0x88F, 0x88F), (0xC5C, 0xC5C), (0xCDC, 0xCDC), (0xA7CE, 0xA7CF), (0xA7D2, 0xA7D2), (0xA7D4, 0xA7D4)),
    *((0xA7F1, 0xA7F1), (0x10940, 0x1095F), (0x10EC5, 0x10EC7), (0x11DB0, 0x11DEF), (0x16EA0, 0x16EDF)),
    *((0x16FF2, 0x16FF6), (0x187F8, 0x187FF), (0x18D09, 0x18D1E), (0x18D80, 0x18DFF), (0x1E6C0, 0x1E6FF)),
    *((0x2B73A, 0x2B73F), (0x2CEA2, 0x2CEAD), (0x323B0, 0x3347F)),
)


class Encoder(Protocol):
    """The interface of an encoder. ``data_tools.tokenizer.Tokenizer`` is the encoder that uses tiktoken."""

    def encode(self, text: str) -> TokenArray:
        """Return the tokens of a text, uint16 of shape (tokens,).

        The string ``<|endoftext|>`` is encoded like any other text. Lone surrogates are replaced by U+FFFD.
        """
        ...


class GigatokenEncoder:
    """An encoder that uses gigatoken with tiktoken's vocabulary.

    gigatoken and tiktoken are built with different versions of Unicode. If a text contains a character that only one of
    the two versions defines, this encoder encodes the text with tiktoken.
    """

    def __init__(self) -> None:
        self._reference = load_tokenizer()
        # Imported here because gigatoken does not exist for every platform.
        import gigatoken

        # gigatoken reads ranks only from a file. Special tokens are ordinary text in documents, so it gets none.
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "gpt2.tiktoken")
            with one_line_write_errors(path):
                path.write_bytes(self._reference.rank_file)
            self._encode = gigatoken.Tokenizer.from_tiktoken(path, "gpt2", {}).backend.encode

    def encode(self, text: str) -> TokenArray:
        text = replace_lone_surrogates(text)
        if not text.isascii() and self._has_new_characters(text):
            return self._reference.encode(text)
        return self._encode(text).astype(np.uint16)

    def _has_new_characters(self, text: str) -> bool:
        points = np.frombuffer(text.encode("utf-32-le"), dtype="<u4")
        return bool(_new_characters()[points[points >= 128]].any())


@functools.cache
def _new_characters() -> npt.NDArray[np.bool_]:
    """Return a flag per code point: True if this Python's Unicode does not assign it, or if Unicode 17 added it."""
    is_new = np.ones(sys.maxunicode + 1, dtype=np.bool_)
    is_new[_ASSIGNED_PLANES[-1][1] :] = False
    for start, stop in _ASSIGNED_PLANES:
        is_new[start:stop] = [unicodedata.category(chr(point)) == "Cn" for point in range(start, stop)]
    for first, last in _NEW_IN_UNICODE_17:
        is_new[first : last + 1] = True
    return is_new


def choose_encoder(name: str) -> str:
    """Return the name of the encoder to use. For ``auto``, this is gigatoken if it is installed, otherwise tiktoken.

    Raises:
        DataError: ``name`` is ``gigatoken``, which is not installed.
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
    """Return an encoder.

    Each encoder is loaded only once per process, because loading takes a second.

    Args:
        name: ``gigatoken`` or ``tiktoken``.
    """
    return GigatokenEncoder() if name == "gigatoken" else load_tokenizer()


def encoder_version(name: str) -> str:
    """Return the name and the version of an encoder as one text."""
    return f"{name} {importlib.metadata.version(name)}"
