"""What a task asks of a model: how likely is this continuation after that context?

Texts become tokens as in lm-evaluation-harness, so that its numbers and these are the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from data_tools.errors import DataError
from data_tools.tokenizer import Tokenizer


@dataclass(frozen=True)
class Request:
    """Tokens of a continuation, to be scored after those of a context."""

    context: tuple[int, ...]  # at least one
    continuation: tuple[int, ...]  # at least one

    def inputs(self, context_length: int) -> tuple[int, ...]:
        """What the model reads: all but the last token. What is too long loses its beginning."""
        return (self.context + self.continuation)[:-1][-context_length:]

    def is_truncated(self, context_length: int) -> bool:
        """Whether the model does not see the beginning of the context."""
        return len(self.context) + len(self.continuation) - 1 > context_length


@dataclass(frozen=True)
class Score:
    """A continuation's log-likelihood in nats, and whether each of its tokens was the likeliest there."""

    log_likelihood: float
    is_greedy: bool


def encode_pair(tokenizer: Tokenizer, context: str, continuation: str) -> Request:
    """Tokens of a context and its continuation, encoded as one text and cut where the context's tokens end.

    White space at the end of the context moves to the continuation: GPT-2's tokens begin with it. An empty
    context is ``<|endoftext|>``. (``TemplateLM.loglikelihood`` and ``_encode_pair`` of lm-evaluation-harness.)

    Raises:
        DataError: nothing is left to score.
    """
    kept = context.rstrip()
    if context and not kept:
        raise DataError("the context is white space alone; leave it empty, or give it a word")
    continuation = context[len(kept) :] + continuation
    before = tokenizer.encode(kept).tolist()
    whole = tokenizer.encode(kept + continuation).tolist()
    return _checked(before or [tokenizer.end_of_text], whole[len(before) :], continuation)


def encode_apart(tokenizer: Tokenizer, context: str, continuation: str) -> Request:
    """Tokens of a context and of its continuation, each encoded on its own, as build-nanogpt does for HellaSwag.

    Raises:
        DataError: nothing is left to score, or to score it after.
    """
    before = tokenizer.encode(context).tolist()
    if not before:
        raise DataError("the context is empty")
    return _checked(before, tokenizer.encode(continuation).tolist(), continuation)


def _checked(context: list[int], continuation: list[int], text: str) -> Request:
    if not continuation:
        raise DataError(f"the continuation {text!r} has no token of its own; give it at least one character")
    return Request(tuple(context), tuple(continuation))


def rolling_windows(tokens: list[int], first: int, context_length: int, stride: int) -> Iterator[Request]:
    """A whole text as windows, in which each token is scored once.

    The first window scores up to ``context_length`` tokens after ``first``; each further one moves on by ``stride``
    and scores the tokens that are new, after as many before them as fit.
    (``get_rolling_token_windows`` of lm-evaluation-harness, whose ``context_len`` is ``context_length - stride + 1``.)
    """
    assert 1 <= stride <= context_length
    done = 0
    while done < len(tokens):
        end = min(len(tokens), done + (stride if done else context_length))
        start = end - context_length - 1  # of what the model reads; -1: the first token is ``first``
        context = tokens[max(start, 0) : done] if start >= 0 else [first, *tokens[:done]]
        yield Request(tuple(context), tuple(tokens[done:end]))
        done = end
