"""A text is scored in windows, each token once. Its perplexities are what a loop over plain scores computes."""

from __future__ import annotations

import logging
import math
import re
from pathlib import Path

import pytest

from data_tools.errors import DataError
from data_tools.tokenizer import Tokenizer
from pipeline.errors import ConfigError
from pipeline.evaluation import intervals
from pipeline.evaluation.examples import Settings
from pipeline.evaluation.packing import Request
from pipeline.evaluation.scoring import Scorer
from pipeline.evaluation.tasks import prepare_task
from pipeline.evaluation.texts import rolling_windows
from pipeline.model.gpt2 import GPT2
from tests.pipeline.evaluation.conftest import ALONE, CONTEXT, measure, plain_score, write_lines


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


@pytest.mark.parametrize("stride", [None, 7])
def test_figures_of_a_text(
    text_model: GPT2,
    scorer: Scorer,
    tokenizer: Tokenizer,
    tmp_path: Path,
    stride: int | None,
    monkeypatch: pytest.MonkeyPatch,
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
    assert result["token_perplexity_interval"] is None, "its windows are too few"
    monkeypatch.setattr(intervals, "FEWEST_VALUES", 2)
    low, high = measure(scorer, "own", tmp_path / "own.txt", stride=stride)["token_perplexity_interval"]
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


def test_empty_texts_are_left_out_and_counted(scorer: Scorer, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """They change no figure, and the limit counts the other texts."""
    rows = [{"text": text} for text in ("", "One two", "", "Three four five", "Six")]
    filled = [row for row in rows if row["text"]]
    with caplog.at_level(logging.WARNING):
        result = measure(scorer, "own", write_lines(tmp_path / "rows.jsonl", rows), limit=2)
    assert f"own_first2: 2 empty texts of {tmp_path / 'rows.jsonl'} are left out" in caplog.text
    expected = measure(scorer, "own", write_lines(tmp_path / "filled.jsonl", filled), limit=2)
    assert (result["examples"], result["empty_texts_left_out"], expected["empty_texts_left_out"]) == (2, 2, 0)
    for key in ("token_perplexity", "word_perplexity", "bits_per_byte", "words", "token_perplexity_interval"):
        assert result[key] == expected[key], key
    pages = write_lines(tmp_path / "pages.jsonl", [{"page": ""}, {"page": " = One = \n\n Text . \n"}])
    assert measure(scorer, "wikitext2", pages)["empty_texts_left_out"] == 1


def test_empty_texts_alone_are_an_error_before_scoring(scorer: Scorer, tmp_path: Path) -> None:
    for rows in ([{"text": ""}, {"text": ""}], [{"page": ""}]):
        path = write_lines(tmp_path / "rows.jsonl", rows)
        with pytest.raises(DataError, match="all texts are empty"):
            prepare_task("wikitext2", str(path), Settings(), scorer.model, ALONE)
    with pytest.raises(DataError, match="row 2: text is null; expected a text file"):
        prepare_task("own", str(write_lines(path, [{"text": "a"}, {"text": None}])), Settings(), scorer.model, ALONE)


def test_the_scores_of_texts_give_the_figures(scorer: Scorer, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "rows.jsonl", [{"text": "One two"}, {"text": "Three " * CONTEXT}])
    result, examples = prepare_task("own", str(path), Settings(), scorer.model, ALONE).measure(scorer)
    loss = -sum(example["log_likelihoods"][0] for example in examples)
    assert result["token_perplexity"] == pytest.approx(math.exp(loss / sum(example["tokens"] for example in examples)))
