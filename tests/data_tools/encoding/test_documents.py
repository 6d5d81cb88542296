"""Check the fingerprints of documents, and how documents become tokens and flags."""

from __future__ import annotations

import numpy as np
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st

from data_tools.encoding.documents import Dialogue, Document, beginning_of, encode_document, fingerprint_of, utf8_of
from data_tools.encoding.encoders import load_encoder
from data_tools.vocabulary import END_OF_TEXT

TEXTS = st.text(st.characters(codec=None), max_size=5)
DIALOGUES = st.lists(st.tuples(TEXTS, st.booleans()), max_size=4).map(lambda segments: Dialogue(tuple(segments)))


def fingerprint(document: Document) -> bytes:
    return fingerprint_of(document, utf8_of(document))


@given(first=TEXTS, second=TEXTS)
def test_texts_have_the_same_fingerprint_exactly_if_they_are_encoded_the_same(first: str, second: str) -> None:
    assert len(fingerprint(first)) == 16
    assert (fingerprint(first) == fingerprint(second)) == (utf8_of(first) == utf8_of(second))


@given(first=DIALOGUES, second=DIALOGUES)
def test_dialogues_differ_when_their_segments_do(first: Dialogue, second: Dialogue) -> None:
    def segments(dialogue: Dialogue) -> list[tuple[bytes, bool]]:
        return [(utf8_of(text), scored) for text, scored in dialogue.segments]

    if segments(first) != segments(second):
        assert fingerprint(first) != fingerprint(second)
    assert fingerprint(first) == fingerprint(Dialogue(first.segments))
    assert fingerprint(first) != fingerprint(first.text)


def test_bytes_are_those_of_the_text_that_is_encoded() -> None:
    assert [len(utf8_of(text)) for text in ("abc", "é漢🙂", "\ud800", "\ud83d\ude00", "")] == [3, 2 + 3 + 4, 3, 4, 0]
    assert utf8_of(Dialogue((("a", True), ("é", False)))) == "aé".encode()


def test_a_document_without_text_is_false() -> None:
    assert not Dialogue(())
    assert not Dialogue((("", True), ("", False)))
    assert Dialogue((("", True), ("a", False)))


def test_end_of_text_comes_first(reference: tiktoken.Encoding) -> None:
    for name in ("gigatoken", "tiktoken"):
        encoded = encode_document(load_encoder(name), "a <|endoftext|> b")
        assert encoded.tokens.dtype == np.uint16
        assert encoded.tokens.tolist() == [END_OF_TEXT, *reference.encode_ordinary("a <|endoftext|> b")]
        assert encoded.scored is None


def test_segments_of_a_dialogue_are_encoded_by_themselves(reference: tiktoken.Encoding) -> None:
    dialogue = Dialogue((("Question: hel", False), ("lo", True), ("", False), (" world", True)))
    encoded = encode_document(load_encoder("gigatoken"), dialogue)
    pieces = [reference.encode_ordinary(text) for text, _ in dialogue.segments]
    assert encoded.tokens.tolist() == [END_OF_TEXT, *sum(pieces, [])]
    flags = [scored for piece, (_, scored) in zip(pieces, dialogue.segments, strict=True) for _ in piece]
    assert encoded.scored is not None
    assert encoded.scored.tolist() == [True, *flags]


@given(
    text=st.lists(
        st.sampled_from(["a", "don", "'t", "'ll", " ", "  ", "\n", "\t", "\x1c", "\xa0", "é", "漢", "1", "!", "\ud800"])
    ).map("".join),
    characters=st.integers(0, 30),
)
@settings(max_examples=300, deadline=None)
def test_the_tokens_of_a_beginning_are_the_first_tokens_of_the_text(text: str, characters: int) -> None:
    beginning = beginning_of(text, characters)
    assert isinstance(beginning, str)
    assert text.startswith(beginning)
    assert len(beginning) <= characters or beginning == text
    tokens = load_encoder("tiktoken").encode(beginning)
    np.testing.assert_array_equal(load_encoder("tiktoken").encode(text)[: tokens.size], tokens)


def test_a_beginning_has_as_many_whole_words_as_fit() -> None:
    assert beginning_of("one two three", 8) == "one two"
    assert beginning_of("one two three", 4) == "one"
    assert beginning_of("onetwothree", 8) == "onetwothree"
    assert beginning_of(" " * 1000 + "word", 8) == " " * 1000 + "word"
