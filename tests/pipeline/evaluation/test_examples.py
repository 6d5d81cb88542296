"""Rows become the examples and few-shot prompts of lm-evaluation-harness."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from data_tools.errors import DataError
from data_tools.tokenizer import Tokenizer
from pipeline.config.schema import ModelConfig
from pipeline.evaluation.examples import Settings
from pipeline.evaluation.scoring import Scorer
from pipeline.evaluation.tasks import prepare_task
from tests.pipeline.evaluation.conftest import ALONE, ARC, HELLASWAG, LAMBADA, PIQA, WINOGRANDE, measure, write_lines


def prompts(name: str, path: Path, model: ModelConfig, tokenizer: Tokenizer, **settings: Any) -> list[list[str]]:
    """Return what the model is shown: context and continuation, separated by a bar."""
    task = prepare_task(name, str(path), Settings(**settings), model, ALONE)
    decode = tokenizer.decode
    return [[f"{decode(one.context)}|{decode(one.continuation)}" for one in group] for group in task.groups]


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
def test_prompts(
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


def test_shots_are_other_examples_with_their_solutions(scorer: Scorer, tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "rows.jsonl", PIQA)
    model = scorer.model.model_copy(update={"context_length": 1000})
    found = prompts("piqa", path, model, tokenizer, shots=2)
    assert found == prompts("piqa", path, model, tokenizer, shots=2), "the seed is fixed"
    for row, (first, _) in zip(PIQA, found, strict=True):
        *shots, own = first.split("\n\n")
        assert own == f"Question: {row['goal']}\nAnswer:| {row['sol1']}"
        solved = [f"Question: {r['goal']}\nAnswer: {r['sol2' if r['label'] else 'sol1']}" for r in PIQA if r != row]
        assert len(set(shots)) == 2
        assert set(shots) <= set(solved)


def test_too_many_shots_are_an_error(scorer: Scorer, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "rows.jsonl", PIQA)
    with pytest.raises(DataError, match="--shots 6: there are only 5 examples"):
        measure(scorer, "piqa", path, shots=6)


def test_limit_takes_the_first_examples(scorer: Scorer, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "rows.jsonl", PIQA)
    some = measure(scorer, "piqa", path, limit=2)
    alone = measure(scorer, "piqa", write_lines(tmp_path / "two.jsonl", PIQA[:2]))
    assert some["acc"] == alone["acc"]
    assert (some["examples"], some["limit"]) == (2, 2)
    assert Settings(limit=2, shots=3).label("piqa") == "piqa_3shot_first2"


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (
            '{"goal": "x", "sol1": "a"}\n',
            r"row 1 has goal, sol1 and is no example of this task \(no sol2\); expected goal, sol1, sol2,",
        ),
        ('{"goal": "x", "sol1": "a", "sol2": "b", "label": 2}', "the right choice is 2, there are 2"),
        ('{"goal": "x", "sol1": "", "sol2": "b", "label": "?"}', "invalid literal"),
        ("{]\n", "line 1 is not JSON"),
        ("[1]\n", "line 1 is a list"),
        ("", "is empty"),
    ],
)
def test_unusable_rows(content: str, expected: str, scorer: Scorer, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(content)
    with pytest.raises(DataError, match=expected):
        measure(scorer, "piqa", tmp_path / "rows.jsonl")
