"""Check that every encoder gives tiktoken's tokens for any text, in time proportional to its length."""

from __future__ import annotations

import importlib.util
import logging
import time

import numpy as np
import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st

from data_tools.encoding.encoders import (
    _OLD,
    Encoder,
    GigatokenEncoder,
    _find_kinds,
    _kinds_of_characters,
    choose_encoder,
    encoder_version,
    has_new_characters,
    load_encoder,
)
from data_tools.errors import DataError
from data_tools.tokenizer import load_tokenizer
from tests.data_tools.conftest import varied_documents

PATHOLOGICAL = {
    "spaces": " ",
    "one letter": "a",
    "one sign": "!",
    "newlines": "\n",
    "NUL": "\0",
    "no white space": "abcdefghij1!é漢",
    "emoji": "🙂",
    "surrogates": "a \ud800",
    "end of text": "<|endoftext|>",
}
#: Text in which a change of class, a contraction or white space at the end of a word matters.
FRAGMENTS = st.sampled_from(
    ["'s", "'S", "'ll", " ", "  ", "\n", "\r\n", "\t", "\u00a0", "\u2003", "\u0085", "\u200b", "\ufeff", "a", "Z", "é"]
    + ["e\u0301", "1", "²", "Ⅷ", "٣", "漢", "ʼ", "’", "_", "!", "...", "<|endoftext|>", "🙂", "\ud83d", "\ude42", "\0"]
)
TEXT = st.one_of(
    st.text(st.characters(codec=None)),  # surrogates included
    st.text(st.characters(categories=["Zs", "Zl", "Zp", "Cc", "Cs", "Cf", "Nd", "Nl", "No", "Lm", "Mn"])),
    st.lists(FRAGMENTS, max_size=60).map("".join),
)


@pytest.fixture(scope="module", params=["gigatoken", "tiktoken"])
def encoder(request: pytest.FixtureRequest) -> Encoder:
    return load_encoder(request.param)


@pytest.fixture(scope="module")
def gigatoken() -> GigatokenEncoder:
    return GigatokenEncoder()


def test_tokens_are_those_of_encode_ordinary(encoder: Encoder, reference: tiktoken.Encoding) -> None:
    for text in [*varied_documents(50), "", *PATHOLOGICAL.values()]:
        tokens = encoder.encode(text)
        assert tokens.dtype == np.uint16
        assert tokens.tolist() == reference.encode_ordinary(text)


@given(text=TEXT)
@settings(max_examples=1000, deadline=None)
def test_gigatoken_agrees_with_tiktoken_on_any_text(
    gigatoken: Encoder, reference: tiktoken.Encoding, text: str
) -> None:
    assert gigatoken.encode(text).tolist() == reference.encode_ordinary(text)


@pytest.mark.parametrize("context", ["{}'s", "a{}b1{}2", "  {} \n {}!", "漢{}漢"])
def test_gigatoken_agrees_on_every_character(gigatoken: GigatokenEncoder, context: str) -> None:
    """Compare all characters, because each library has its own version of the tables of character classes."""
    tiktoken_encoder = load_encoder("tiktoken")
    _find_kinds(range(0xF0000))
    old = [chr(point) for point in np.flatnonzero(_kinds_of_characters() == _OLD) if not 0xD800 <= point < 0xE000]
    assert len(old) > 150_000
    for start in range(0, len(old), 50_000):
        text = "\n".join(context.replace("{}", character) for character in old[start : start + 50_000])
        assert not has_new_characters(text.encode())  # otherwise it would ask tiktoken
        np.testing.assert_array_equal(gigatoken.encode(text), tiktoken_encoder.encode(text))


@pytest.mark.parametrize("new", ["\u088f", "\ua7f1", "\U00010940", "\U0003241a", "\U000323da"], ids=ascii)
def test_characters_of_another_unicode_version_are_encoded_as_by_tiktoken(
    gigatoken: Encoder, reference: tiktoken.Encoding, new: str
) -> None:
    for text in [f"{new}'s", f" {new}'ll go", f"{new}醒", f"a{new}b", "x" * 1000 + new + "'s"]:
        assert gigatoken.encode(text).tolist() == reference.encode_ordinary(text)


def test_long_white_space_is_encoded_alike(gigatoken: Encoder) -> None:
    text = "a" + " " * 1_000_000 + "b\n" + " \n" * 500_000 + " c"
    assert gigatoken.encode(text).tolist() == load_tokenizer().encode(text).tolist()


@pytest.mark.parametrize("unit", PATHOLOGICAL.values(), ids=PATHOLOGICAL)
def test_pathological_text_is_exact_and_takes_time_in_proportion(gigatoken: Encoder, unit: str) -> None:
    tokens, elapsed_s = {}, {}
    for name, encoder in (("gigatoken", gigatoken), ("tiktoken", load_encoder("tiktoken"))):
        for characters in (250_000, 1_000_000):
            text = (unit * characters)[:characters]
            started_s = time.process_time()
            tokens[name] = encoder.encode(text)
            elapsed_s[characters] = time.process_time() - started_s
        # Four times the text; quadratic would be sixteen times the time, and minutes.
        assert elapsed_s[1_000_000] < 12 * elapsed_s[250_000] + 0.5, name
    np.testing.assert_array_equal(tokens["gigatoken"], tokens["tiktoken"])


def test_encoders_are_chosen_by_what_is_installed(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert choose_encoder("auto") == choose_encoder("gigatoken") == "gigatoken"
    assert choose_encoder("tiktoken") == "tiktoken"
    with monkeypatch.context() as patch, caplog.at_level(logging.INFO):
        patch.setattr(importlib.util, "find_spec", lambda name: None)
        assert choose_encoder("auto") == "tiktoken"
        assert "gigatoken is not installed" in caplog.text
        with pytest.raises(DataError, match="--encoder gigatoken: it is not installed; pip install gigatoken"):
            choose_encoder("gigatoken")


@pytest.mark.parametrize("encoder", ["gigatoken", "tiktoken"])
def test_an_encoder_has_a_version(encoder: str) -> None:
    name, version = encoder_version(encoder).split()
    assert name == encoder
    assert version[0].isdigit()
