"""What the tasks report is what their definitions say, computed by hand from plain scores."""

from __future__ import annotations

import hashlib
import json
import math
import re
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest

from data_tools.errors import DataError
from data_tools.tokenizer import Tokenizer
from pipeline.config.schema import ModelConfig, TaskName
from pipeline.errors import ConfigError
from pipeline.evaluation.catalogue import NAMED_TASKS
from pipeline.evaluation.preparation import expect_known_tasks, prepare_task
from pipeline.evaluation.prepared import Settings
from pipeline.evaluation.requests import Request, encode_apart, encode_pair
from pipeline.evaluation.scoring import Scorer
from pipeline.model.gpt2 import GPT2
from tests.pipeline.conftest import tiny_model_config
from tests.pipeline.evaluation.conftest import ALONE, CONTEXT, LAMBADA, PIQA, plain_score, write_lines

HELLASWAG = {
    "activity_label": "Skating",
    "ctx_a": "A man stands on the ice.",
    "ctx_b": "he [substeps] begins",
    "ctx": "A man stands on the ice. he [substeps] begins",
    "endings": ["to  skate. [title] Fine", "to swim in it.", "flies.", "cooks an egg."],
    "label": "2",
}
ARC = {
    "question": "What is wet?",
    "choices": {"text": ["Stone", "Water", "Dust"], "label": ["A", "B", "C"]},
    "answerKey": "B",
}
WINOGRANDE = {
    "sentence": "The cup did not fit the box because the _ was too large.",
    "option1": "cup",
    "option2": "box",
    "answer": "1",
}


def measure(scorer: Scorer, name: str, path: Path, **settings: Any) -> dict[str, Any]:
    return prepare_task(name, str(path), Settings(**settings), scorer.model, ALONE).measure(scorer)


def prompts(name: str, path: Path, model: ModelConfig, tokenizer: Tokenizer, **settings: Any) -> list[list[str]]:
    """What the model is shown, context and continuation divided by a bar."""
    task = prepare_task(name, str(path), Settings(**settings), model, ALONE)
    decode = tokenizer.decode
    return [[f"{decode(one.context)}|{decode(one.continuation)}" for one in group] for group in task.groups]


class TestPrompts:
    @pytest.mark.parametrize(
        ("name", "row", "expected"),
        [
            ("piqa", PIQA[0], ["Question: Dry wet shoes\nAnswer:| Put them in paper.", None]),
            (
                "piqa",
                {"query": "Question: Dry wet shoes\n", "choices": ["a b", "c"], "gold": 1},
                ["Question: Dry wet shoes\nAnswer:| a b", "Question: Dry wet shoes\nAnswer:| c"],
            ),
            ("arc_easy", ARC, [None, "Question: What is wet?\nAnswer:| Water", None]),
            (
                "hellaswag",
                HELLASWAG,
                ["Skating: A man stands on the ice. He begins| to skate.. Fine", None, None, None],
            ),
            (
                "hellaswag_completion",
                HELLASWAG,
                ["A man stands on the ice. he [substeps] begins| to  skate. [title] Fine", None, None, None],
            ),
            (
                "winogrande",
                WINOGRANDE,
                [f"The cup did not fit the box because the {option}| was too large." for option in ("cup", "box")],
            ),
            ("lambada", LAMBADA[0], ["The cat sat on the mat, and the dog sat on the other| mat"]),
            ("lambada", {"context": "on the other", "continuation": "mat"}, ["on the other| mat"]),
            ("own", {"query": "Is it?", "choices": ["yes", "no"], "gold": 0}, ["Is it?| yes", "Is it?| no"]),
            ("own", {"context": "def f", "continuation": "\n  (x)"}, ["def f|\n  (x)"]),
            ("own", {"context": "one", "continuation": "two"}, ["one| two"]),
        ],
    )
    def test_of_each_task(
        self,
        name: str,
        row: dict[str, Any],
        expected: list[str | None],
        scorer: Scorer,
        tokenizer: Tokenizer,
        tmp_path: Path,
    ) -> None:
        (found,) = prompts(name, write_lines(tmp_path / "rows.jsonl", [row]), scorer.model, tokenizer)
        assert len(found) == len(expected)
        for text, wanted in zip(found, expected, strict=True):
            assert wanted in (None, text)

    def test_shots_are_solved_others(self, scorer: Scorer, tokenizer: Tokenizer, tmp_path: Path) -> None:
        path = write_lines(tmp_path / "rows.jsonl", PIQA)
        model = scorer.model.model_copy(update={"context_length": 1000})
        found = prompts("piqa", path, model, tokenizer, shots=2)
        assert found == prompts("piqa", path, model, tokenizer, shots=2), "drawn with a fixed seed"
        for row, (first, _) in zip(PIQA, found, strict=True):
            *shots, own = first.split("\n\n")
            assert own == f"Question: {row['goal']}\nAnswer:| {row['sol1']}"
            solved = [f"Question: {r['goal']}\nAnswer: {r['sol2' if r['label'] else 'sol1']}" for r in PIQA if r != row]
            assert len(set(shots)) == 2
            assert set(shots) <= set(solved)

    def test_too_many_shots(self, scorer: Scorer, tmp_path: Path) -> None:
        path = write_lines(tmp_path / "rows.jsonl", PIQA)
        with pytest.raises(DataError, match="--shots 6: there are only 5 examples"):
            measure(scorer, "piqa", path, shots=6)


class TestFigures:
    def test_choices(self, text_model: GPT2, scorer: Scorer, tokenizer: Tokenizer, tmp_path: Path) -> None:
        path = write_lines(tmp_path / "piqa.jsonl", PIQA)
        result = measure(scorer, "piqa", path)
        hits, normed = 0, 0
        for row in PIQA:
            choices = [row["sol1"], row["sol2"]]
            pairs = [encode_pair(tokenizer, f"Question: {row['goal']}\nAnswer:", f" {choice}") for choice in choices]
            scores = np.array([plain_score(text_model, pair)[0] for pair in pairs])
            hits += int(scores.argmax()) == row["label"]
            normed += int((scores / [len(choice) for choice in choices]).argmax()) == row["label"]
        assert result["acc"] == hits / len(PIQA)
        assert result["acc_norm"] == normed / len(PIQA)
        low, high = result["acc_interval"]
        assert 0 <= low < result["acc"] < high <= 1
        assert result["examples"] == len(PIQA)
        assert result["data_sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
        assert result["truncated_requests"] == 2
        assert "lm-evaluation-harness piqa" in result["protocol"]
        json.dumps(result)

    def test_completion_compares_the_mean_loss_of_tokens(
        self, text_model: GPT2, scorer: Scorer, tokenizer: Tokenizer, tmp_path: Path
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

    def test_a_last_word(self, text_model: GPT2, scorer: Scorer, tokenizer: Tokenizer, tmp_path: Path) -> None:
        result = measure(scorer, "lambada", write_lines(tmp_path / "rows.jsonl", LAMBADA))
        pairs = [encode_pair(tokenizer, *re.fullmatch(r"(.*)( \S+)", row["text"]).groups()) for row in LAMBADA]  # type: ignore[union-attr]
        scores = [plain_score(text_model, pair)[0] for pair in pairs]
        assert result["perplexity"] == pytest.approx(math.exp(-np.mean(scores)), rel=1e-5)
        low, high = result["perplexity_interval"]
        assert low < result["perplexity"] < high
        assert result["acc"] == 0.0
        assert result["acc_interval"][1] > 0.3, "three examples say little"

    @pytest.mark.parametrize("stride", [None, 7])
    def test_a_text(
        self, text_model: GPT2, scorer: Scorer, tokenizer: Tokenizer, tmp_path: Path, stride: int | None
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

    def test_wikitext_is_detokenized_article_by_article(
        self, text_model: GPT2, scorer: Scorer, tokenizer: Tokenizer, tmp_path: Path
    ) -> None:
        pages = [" = One = \n\n It cost 1 @,@ 000 . \n = = Part = = \n Yes . \n", " = Two = \n\n No ( none ) . \n"]
        (tmp_path / "wiki.txt").write_text("\n" + "".join(pages), encoding="utf-8")
        result = measure(scorer, "wikitext2", tmp_path / "wiki.txt")
        texts = [" = One =\n\nIt cost 1,000.\n== Part ==\nYes. ", " = Two =\n\nNo (none).\n"]
        loss = 0.0
        for text in texts:
            tokens = tokenizer.encode(text).tolist()
            loss -= plain_score(text_model, Request((tokenizer.end_of_text,), tuple(tokens)))[0]
        assert result["examples"] == 2
        assert result["words"] == sum(len(re.split(r"\s+", page)) for page in (pages[0].removesuffix("\n"), pages[1]))
        assert result["token_perplexity"] == pytest.approx(math.exp(loss / result["tokens"]), rel=1e-5)

    def test_a_limit_takes_the_first(self, scorer: Scorer, tmp_path: Path) -> None:
        path = write_lines(tmp_path / "rows.jsonl", PIQA)
        some = measure(scorer, "piqa", path, limit=2)
        alone = measure(scorer, "piqa", write_lines(tmp_path / "two.jsonl", PIQA[:2]))
        assert some["acc"] == alone["acc"]
        assert (some["examples"], some["limit"]) == (2, 2)
        assert Settings(limit=2, shots=3).label("piqa") == "piqa_3shot_first2"


class TestNames:
    def test_every_named_task_but_validation_is_in_the_catalogue(self) -> None:
        assert set(NAMED_TASKS) == set(get_args(TaskName)) - {"validation"}

    def test_an_unknown_name_needs_a_file(self) -> None:
        expect_known_tasks(["piqa", "own"], {"own": "file"})
        with pytest.raises(ConfigError, match="--tasks own: no such task; there are: validation, wikitext2"):
            expect_known_tasks(["own"], {})

    def test_text_needs_gpt2s_vocabulary(self, tmp_path: Path) -> None:
        path = write_lines(tmp_path / "rows.jsonl", PIQA)
        with pytest.raises(ConfigError, match="piqa: model.vocab_size is 89"):
            prepare_task("piqa", str(path), Settings(), tiny_model_config(), ALONE)


class TestMistakes:
    @pytest.mark.parametrize(
        ("content", "expected"),
        [
            ('{"goal": "x", "sol1": "a"}\n', "row 1 has goal, sol1 and is no example of this task .no sol2."),
            ('{"goal": "x", "sol1": "a", "sol2": "b", "label": 2}', "the right choice is 2, there are 2"),
            ('{"goal": "x", "sol1": "", "sol2": "b", "label": "?"}', "invalid literal"),
            ("{]\n", "line 1 is not JSON"),
            ("[1]\n", "line 1 is a list"),
            ("", "is empty"),
        ],
    )
    def test_rows(self, content: str, expected: str, scorer: Scorer, tmp_path: Path) -> None:
        (tmp_path / "rows.jsonl").write_text(content)
        with pytest.raises(DataError, match=expected):
            measure(scorer, "piqa", tmp_path / "rows.jsonl")

    def test_texts(self, scorer: Scorer, tmp_path: Path) -> None:
        (tmp_path / "latin.txt").write_bytes("é".encode("latin-1"))
        with pytest.raises(DataError, match="latin.txt is not UTF-8 text"):
            measure(scorer, "own", tmp_path / "latin.txt")
        (tmp_path / "own.txt").write_text("text")
        with pytest.raises(ConfigError, match="--shots 1: a text has no examples"):
            measure(scorer, "own", tmp_path / "own.txt", shots=1)
        with pytest.raises(ConfigError, match="--stride 41 skips tokens"):
            measure(scorer, "own", tmp_path / "own.txt", stride=41)
