"""Texts become requests as in lm-evaluation-harness."""

from __future__ import annotations

import pytest

from data_tools.errors import DataError
from data_tools.tokenizer import Tokenizer
from pipeline.evaluation.requests import encode_apart, encode_pair, rolling_windows


def texts(tokenizer: Tokenizer, context: str, continuation: str) -> tuple[str, str]:
    request = encode_pair(tokenizer, context, continuation)
    return tokenizer.decode(request.context), tokenizer.decode(request.continuation)


def test_a_space_at_the_end_of_the_context_begins_the_continuation(tokenizer: Tokenizer) -> None:
    assert texts(tokenizer, "The answer: ", "yes") == ("The answer:", " yes")
    assert texts(tokenizer, "One line\n", " and more") == ("One line", "\n and more")


def test_the_pair_is_encoded_as_one_text(tokenizer: Tokenizer) -> None:
    """A word cut in two is one token there; the cut is after as many tokens as the context alone has."""
    request = encode_pair(tokenizer, "the straw", "berries are ripe")
    whole = tokenizer.encode("the strawberries are ripe").tolist()
    assert list(request.context) == tokenizer.encode("the straw").tolist()
    assert list(request.continuation) == whole[len(request.context) :]
    assert list(request.continuation) != tokenizer.encode("berries are ripe").tolist()


def test_an_empty_context_is_the_end_of_a_text(tokenizer: Tokenizer) -> None:
    assert encode_pair(tokenizer, "", "Hello").context == (tokenizer.end_of_text,)


def test_halves_may_be_encoded_apart(tokenizer: Tokenizer) -> None:
    request = encode_apart(tokenizer, "some straw", "berries")
    assert list(request.continuation) == tokenizer.encode("berries").tolist()


def test_nothing_to_score_is_an_error(tokenizer: Tokenizer) -> None:
    for context, continuation in (("a", ""), ("   ", "b")):
        with pytest.raises(DataError):
            encode_pair(tokenizer, context, continuation)
    with pytest.raises(DataError, match="the context is empty"):
        encode_apart(tokenizer, "", "b")


@pytest.mark.parametrize("tokens", [1, 7, 8, 9, 16, 17, 40])
@pytest.mark.parametrize("stride", [1, 3, 8])
def test_windows_score_each_token_once_after_all_that_fits(tokens: int, stride: int) -> None:
    text, length = list(range(100, 100 + tokens)), 8
    windows = list(rolling_windows(text, 0, length, stride))
    assert [token for window in windows for token in window.continuation] == text
    for number, window in enumerate(windows):
        inputs = window.inputs(length)
        assert not window.is_truncated(length)
        assert number == 0 or len(inputs) == length, "a later window is full"
        assert number == 0 or len(window.continuation) <= stride
        assert inputs[-len(window.continuation) :][1:] == window.continuation[:-1]
    assert windows[0].context == (0,)


def test_windows_that_do_not_overlap() -> None:
    windows = list(rolling_windows([1, 2, 3, 4, 5, 6, 7], 0, 3, 3))
    assert [(w.context, w.continuation) for w in windows] == [
        ((0,), (1, 2, 3)),
        ((3,), (4, 5, 6)),
        ((4, 5, 6), (7,)),  # the last is filled up from before
    ]
