"""Texts become requests as in lm-evaluation-harness; figures are what a loop over plain scores computes."""

from __future__ import annotations

import hashlib
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest

from data_tools.errors import DataError
from data_tools.tokenizer import Tokenizer
from pipeline.errors import ConfigError
from pipeline.evaluation.examples import Settings
from pipeline.evaluation.packing import Request
from pipeline.evaluation.protocols import encode_apart, encode_pair, rolling_windows
from pipeline.evaluation.scoring import Scorer
from pipeline.evaluation.tasks import NAMED_TASKS, prepare_task
from pipeline.model.gpt2 import GPT2
from tests.pipeline.evaluation.conftest import (
    ALONE,
    CONTEXT,
    HELLASWAG,
    LAMBADA,
    PIQA,
    measure,
    plain_score,
    write_lines,
)


def texts(tokenizer: Tokenizer, context: str, continuation: str) -> tuple[str, str]:
    request = encode_pair(tokenizer, context, continuation)
    return tokenizer.decode(request.context), tokenizer.decode(request.continuation)


def test_white_space_after_the_context_moves_to_the_continuation(tokenizer: Tokenizer) -> None:
    assert texts(tokenizer, "The answer: ", "yes") == ("The answer:", " yes")
    assert texts(tokenizer, "One line\n", " and more") == ("One line", "\n and more")


def test_the_pair_is_encoded_as_one_text(tokenizer: Tokenizer) -> None:
    """A word that spans both is cut after as many tokens as the context has on its own."""
    request = encode_pair(tokenizer, "the straw", "berries are ripe")
    whole = tokenizer.encode("the strawberries are ripe").tolist()
    assert list(request.context) == tokenizer.encode("the straw").tolist()
    assert list(request.continuation) == whole[len(request.context) :]
    assert list(request.continuation) != tokenizer.encode("berries are ripe").tolist()


def test_an_empty_context_becomes_end_of_text(tokenizer: Tokenizer) -> None:
    assert encode_pair(tokenizer, "", "Hello").context == (tokenizer.end_of_text,)


def test_encode_apart(tokenizer: Tokenizer) -> None:
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
def test_rolling_windows_score_each_token_once_with_a_full_context(tokens: int, stride: int) -> None:
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


def test_rolling_windows_without_overlap() -> None:
    windows = list(rolling_windows([1, 2, 3, 4, 5, 6, 7], 0, 3, 3))
    assert [(w.context, w.continuation) for w in windows] == [
        ((0,), (1, 2, 3)),
        ((3,), (4, 5, 6)),
        ((4, 5, 6), (7,)),  # the last window is filled from the left
    ]


def test_figures_of_choices(text_model: GPT2, scorer: Scorer, tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "piqa.jsonl", PIQA)
    result = measure(scorer, "piqa", path)
    right, right_normed = 0, 0
    for row in PIQA:
        choices = [row["sol1"], row["sol2"]]
        pairs = [encode_pair(tokenizer, f"Question: {row['goal']}\nAnswer:", f" {choice}") for choice in choices]
        scores = np.array([plain_score(text_model, pair)[0] for pair in pairs])
        right += int(scores.argmax()) == row["label"]
        right_normed += int((scores / [len(choice) for choice in choices]).argmax()) == row["label"]
    assert result["acc"] == right / len(PIQA)
    assert result["acc_norm"] == right_normed / len(PIQA)
    low, high = result["acc_interval"]
    assert 0 <= low < result["acc"] < high <= 1
    assert result["examples"] == len(PIQA)
    assert result["data_sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert result["truncated_requests"] == 2
    assert "lm-evaluation-harness piqa" in result["protocol"]
    json.dumps(result)


def test_hellaswag_completion_compares_mean_losses_of_tokens(
    text_model: GPT2, scorer: Scorer, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    rows = [{**HELLASWAG, "label": label} for label in range(4)]
    result = measure(scorer, "hellaswag_completion", write_lines(tmp_path / "rows.jsonl", rows))
    pairs = [encode_apart(tokenizer, HELLASWAG["ctx"], f" {ending}") for ending in HELLASWAG["endings"]]
    losses = [-plain_score(text_model, pair)[0] / len(pair.continuation) for pair in pairs]
    assert result["acc_norm"] == 0.25, "each choice is right once"
    task = prepare_task("hellaswag_completion", str(tmp_path / "rows.jsonl"), Settings(), scorer.model, ALONE)
    protocol = NAMED_TASKS["hellaswag_completion"].protocol
    answers = protocol.answers([], task.groups, scorer.score(task.groups, ""))  # type: ignore[union-attr]
    assert answers["acc_norm"] == [int(np.argmin(losses))] * 4


def test_figures_of_a_continuation(text_model: GPT2, scorer: Scorer, tokenizer: Tokenizer, tmp_path: Path) -> None:
    result = measure(scorer, "lambada", write_lines(tmp_path / "rows.jsonl", LAMBADA))
    pairs = [encode_pair(tokenizer, *re.fullmatch(r"(.*)( \S+)", row["text"]).groups()) for row in LAMBADA]  # type: ignore[union-attr]
    scores = [plain_score(text_model, pair)[0] for pair in pairs]
    assert result["perplexity"] == pytest.approx(math.exp(-np.mean(scores)), rel=1e-5)
    low, high = result["perplexity_interval"]
    assert low < result["perplexity"] < high
    assert result["acc"] == 0.0
    assert result["acc_interval"][1] > 0.3, "three examples say little"


@pytest.mark.parametrize("stride", [None, 7])
def test_figures_of_a_text(
    text_model: GPT2, scorer: Scorer, tokenizer: Tokenizer, tmp_path: Path, stride: int | None
) -> None:
    text = " = Title = \n\n A café costs 1 @,@ 000 . \n" * 9
    (tmp_path / "own.txt").write_text(text, encoding="utf-8")
    result = measure(scorer, "own", tmp_path / "own.txt", stride=stride)
    tokens = tokenizer.encode(text).tolist()
    step, loss = stride or CONTEXT, 0.0
    for at in range(len(tokens)):
        end = CONTEXT if at < CONTEXT else min(CONTEXT + -(-(at + 1 - CONTEXT) // step) * step, len(tokens))
        start = max(end - CONTEXT - 1, -1)
        before = tokens[start:at] if start >= 0 else [tokenizer.end_of_text, *tokens[:at]]
        loss -= plain_score(text_model, Request(tuple(before), (tokens[at],)))[0]
    assert result["tokens"] == len(tokens)
    assert result["token_perplexity"] == pytest.approx(math.exp(loss / len(tokens)), rel=1e-5)
    assert result["word_perplexity"] == pytest.approx(math.exp(loss / len(re.split(r"\s+", text))), rel=1e-4)
    assert result["bits_per_byte"] == pytest.approx(loss / len(text.encode()) / math.log(2), rel=1e-5)
    assert f"moved on by {step}" in result["protocol"]
    low, high = result["token_perplexity_interval"]
    assert low < result["token_perplexity"] < high


def test_texts_refuse_what_they_cannot_use(scorer: Scorer, tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1"))
    with pytest.raises(DataError, match="latin.txt is not UTF-8 text"):
        measure(scorer, "own", tmp_path / "latin.txt")
    (tmp_path / "own.txt").write_text("text")
    with pytest.raises(ConfigError, match="--shots 1: a text has no examples"):
        measure(scorer, "own", tmp_path / "own.txt", shots=1)
    with pytest.raises(ConfigError, match="--stride 41 skips tokens"):
        measure(scorer, "own", tmp_path / "own.txt", stride=41)
