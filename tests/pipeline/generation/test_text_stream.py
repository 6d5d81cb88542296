"""Tokens are decoded as they are generated, and the pieces together are the text."""

from __future__ import annotations

import pytest

from data_tools.tokenizer import load_tokenizer
from pipeline.generation.text_stream import TextStream

BYTES = [bytes([byte]) for byte in range(256)]  # one token per byte cuts every character as often as possible


def pieces(text: bytes, *stops: str) -> list[str]:
    """Return the text that is released after each byte, then the rest."""
    stream = TextStream(BYTES, stops)
    shown = [stream.feed(byte) for byte in text]
    return [*shown, stream.finish()]


def test_a_character_is_released_when_it_is_complete() -> None:
    assert pieces("aß🎉".encode()) == ["a", "", "ß", "", "", "", "🎉", ""]


def test_invalid_utf8_is_replaced() -> None:
    for broken in (b"\xf0\x9f", b"a\xffb", b"\xc3a", b"\xe2\x82"):
        assert "".join(pieces(broken)) == broken.decode(errors="replace")


def test_the_pieces_of_tokens_are_the_text() -> None:
    tokenizer = load_tokenizer()
    text = "Grüße, 世界! 🎉🏳️‍🌈 ½ naïve"
    tokens = tokenizer.encode(text).tolist()
    stream = TextStream(tokenizer.token_bytes)
    assert "".join([*map(stream.feed, tokens), stream.finish()]) == text
    assert len(tokens) < len(text.encode())  # some tokens hold bytes of several characters


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
def test_the_text_ends_before_the_first_stop_text(text: str, stops: list[str], expected: str) -> None:
    shown = pieces(text.encode(), *stops)
    assert "".join(shown) == expected


def test_a_possible_beginning_of_a_stop_text_is_held_back() -> None:
    assert pieces(b"abcx", "bcd") == ["a", "", "", "bcx", ""]
    assert pieces(b"abcd!", "bcd") == ["a", "", "", "", "", ""]


def test_stopped() -> None:
    stream = TextStream(BYTES, ["b"])
    stream.feed(ord("a"))
    assert not stream.stopped
    stream.feed(ord("b"))
    assert stream.stopped
