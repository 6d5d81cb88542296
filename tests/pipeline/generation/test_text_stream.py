"""Tokens become text as they come, and the pieces together are the whole."""

from __future__ import annotations

import pytest

from data_tools.tokenizer import load_tokenizer
from pipeline.generation.text_stream import TextStream

BYTES = [bytes([byte]) for byte in range(256)]  # a token a byte: every character is cut in as many places as can be


def pieces(text: bytes, *stops: str) -> list[str]:
    """What each byte of a text lets be shown, then what is left at the end."""
    stream = TextStream(BYTES, stops)
    shown = [stream.feed(byte) for byte in text]
    return [*shown, stream.finish()]


def test_a_character_appears_when_it_is_whole() -> None:
    assert pieces("aß🎉".encode()) == ["a", "", "ß", "", "", "", "🎉", ""]


def test_what_is_no_utf8_is_replaced() -> None:
    for broken in (b"\xf0\x9f", b"a\xffb", b"\xc3a", b"\xe2\x82"):
        assert "".join(pieces(broken)) == broken.decode(errors="replace")


def test_the_pieces_of_tokens_are_the_text() -> None:
    tokenizer = load_tokenizer()
    text = "Grüße, 世界! 🎉🏳️‍🌈 ½ naïve"
    tokens = tokenizer.encode(text).tolist()
    stream = TextStream(tokenizer.token_bytes)
    assert "".join([*map(stream.feed, tokens), stream.finish()]) == text
    assert len(tokens) < len(text.encode())  # some tokens have several bytes of several characters


@pytest.mark.parametrize(
    ("text", "stops", "expected"),
    [
        ("one. two.", ["."], "one"),
        ("one\n\ntwo", ["\n\n"], "one"),
        ("one\ntwo", ["\n\n"], "one\ntwo"),
        ("aab", ["ab"], "a"),
        ("ababac", ["abac"], "ab"),
        ("xyz", ["zz", "yz"], "x"),
        ("Ende ß.", ["ß"], "Ende "),
        ("ends with a", ["abc"], "ends with a"),
        ("stop", ["stop"], ""),
    ],
)
def test_it_ends_before_the_first_stop_text(text: str, stops: list[str], expected: str) -> None:
    shown = pieces(text.encode(), *stops)
    assert "".join(shown) == expected


def test_nothing_is_shown_that_a_stop_text_may_take_back() -> None:
    assert pieces(b"abcx", "bcd") == ["a", "", "", "bcx", ""]
    assert pieces(b"abcd!", "bcd") == ["a", "", "", "", "", ""]


def test_it_says_when_it_has_stopped() -> None:
    stream = TextStream(BYTES, ["b"])
    stream.feed(ord("a"))
    assert not stream.stopped
    stream.feed(ord("b"))
    assert stream.stopped
