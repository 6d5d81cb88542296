"""Texts become requests as in lm-evaluation-harness; figures are what a loop over plain scores computes."""

from __future__ import annotations

import hashlib
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_tools.errors import DataError
from data_tools.tokenizer import Tokenizer
from pipeline.errors import ConfigError
from pipeline.evaluation import intervals
from pipeline.evaluation.examples import Settings
from pipeline.evaluation.protocols import encode_apart, encode_pair
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


def test_figures_of_a_continuation(
    text_model: GPT2, scorer: Scorer, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = measure(scorer, "lambada", write_lines(tmp_path / "rows.jsonl", LAMBADA))
    pairs = [encode_pair(tokenizer, *re.fullmatch(r"(.*)( \S+)", row["text"]).groups()) for row in LAMBADA]  # type: ignore[union-attr]
    scores = [plain_score(text_model, pair)[0] for pair in pairs]
    assert result["perplexity"] == pytest.approx(math.exp(-np.mean(scores)), rel=1e-5)
    assert result["perplexity_interval"] is None, "three examples are too few"
    monkeypatch.setattr(intervals, "FEWEST_VALUES", 3)
    low, high = measure(scorer, "lambada", tmp_path / "rows.jsonl")["perplexity_interval"]
    assert low < result["perplexity"] < high
    assert result["acc"] == 0.0
    assert result["acc_interval"][1] > 0.3, "three examples say little"


def test_figures_of_contexts(text_model: GPT2, scorer: Scorer, tokenizer: Tokenizer, tmp_path: Path) -> None:
    """The context with which the continuation is most likely is the choice, also in a longer context."""
    contexts = ["The cup did not fit the box because the cup", "The cup did not fit the box because the box"]
    rows = [{"contexts": contexts, "continuation": "was too large.", "gold": gold} for gold in (0, 1, 1)]
    result = measure(scorer, "own", write_lines(tmp_path / "rows.jsonl", rows))
    scores = [plain_score(text_model, encode_pair(tokenizer, text, " was too large."))[0] for text in contexts]
    assert result["acc"] == pytest.approx((2 if np.argmax(scores) else 1) / 3)
    assert "acc_norm" not in result


@pytest.mark.parametrize(
    ("task", "row", "rendered"),
    [
        ("arc_easy", {"query": "Question: Wet?\nAnswer:", "choices": ["a", "b", "c"], "gold": 0}, False),
        ("arc_easy", {"query": "Question: Wet?", "choices": ["a", "b", "c", "d"], "gold": 0}, False),
        ("arc_easy", {"query": "Wet?", "choices": ["a", "b", "c"], "gold": 0}, True),
        ("arc_easy", {"query": "He fell because", "choices": ["a", "b"], "gold": 0}, True),  # COPA
        ("arc_challenge", {"query": "Question: Why?\nAnswer:", "choices": ["a", "b"], "gold": 0}, True),
        ("piqa", {"query": "Question: Why?\n", "choices": ["a", "b"], "gold": 0}, False),
        ("piqa", {"query": "Question: Why? Answer:", "choices": ["a", "b"], "gold": 0}, True),
        ("hellaswag", {"query": "Skating: he", "choices": ["a", "b", "c", "d"], "gold": 0}, True),
        ("hellaswag", HELLASWAG, False),
        ("hellaswag_completion", {"query": "he", "choices": ["a", "b", "c", "d"], "gold": 0}, True),
        ("winogrande", {"contexts": ["a", "b"], "continuation": "c", "gold": 0}, True),
        ("lambada", {"context": "one two", "continuation": "three"}, False),
        ("lambada", {"context": "one two", "continuation": "three four"}, True),
    ],
)
def test_the_protocol_names_the_task_only_if_its_prompts_are_the_tasks(
    task: str, row: dict[str, Any], rendered: bool, scorer: Scorer, tmp_path: Path
) -> None:
    path = write_lines(tmp_path / "rows.jsonl", [row])
    protocol = prepare_task(task, str(path), Settings(), scorer.model, ALONE).facts["protocol"]
    named = NAMED_TASKS[task].protocol.protocol  # type: ignore[index]
    expected = f"rendered by the file (1 of 1 examples): {named.partition(': ')[2]}" if rendered else named
    assert protocol == expected


def test_the_scores_of_examples_give_the_figures(scorer: Scorer, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "piqa.jsonl", PIQA)
    result, examples = prepare_task("piqa", str(path), Settings(), scorer.model, ALONE).measure(scorer)
    assert [example["example"] for example in examples] == list(range(1, len(PIQA) + 1))
    assert [example["gold"] for example in examples] == [row["label"] for row in PIQA]
    for key, choice in (("acc", "choice"), ("acc_norm", "choice_norm")):
        assert result[key] == sum(example[choice] == example["gold"] for example in examples) / len(PIQA)
    assert all(example["choice"] == int(np.argmax(example["log_likelihoods"])) for example in examples)

    path = write_lines(tmp_path / "lambada.jsonl", LAMBADA)
    result, examples = prepare_task("lambada", str(path), Settings(), scorer.model, ALONE).measure(scorer)
    mean = np.mean([example["log_likelihoods"] for example in examples])
    assert result["perplexity"] == pytest.approx(math.exp(-mean))


def test_a_text_longer_than_the_context_is_refused_before_scoring(scorer: Scorer, tmp_path: Path) -> None:
    rows = [{"context": "a", "continuation": text} for text in ("b", "word " * (CONTEXT + 1))]
    path = write_lines(tmp_path / "rows.jsonl", rows)
    with pytest.raises(DataError, match=r"row 2: the text to score has 42 tokens, more than the model's context of 40"):
        prepare_task("own", str(path), Settings(), scorer.model, ALONE)
    with pytest.raises(ConfigError, match="--stride 5: .*rows.jsonl has no texts"):
        prepare_task("own", str(path), Settings(stride=5), scorer.model, ALONE)


def test_lambada_as_text_has_one_passage_per_line(scorer: Scorer, tmp_path: Path) -> None:
    rows = write_lines(tmp_path / "rows.jsonl", LAMBADA)
    (tmp_path / "passages.txt").write_text("".join(f"{row['text']}\n" for row in LAMBADA))
    figures, figures_of_lines = (measure(scorer, "lambada", path) for path in (rows, tmp_path / "passages.txt"))
    assert figures_of_lines["examples"] == len(LAMBADA)
    assert {**figures_of_lines, "data": "", "data_sha256": ""} == {**figures, "data": "", "data_sha256": ""}
