"""Rows become the examples and few-shot prompts of lm-evaluation-harness."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from data_tools.errors import DataError
from data_tools.tokenizer import Tokenizer
from pipeline.config.schema import ModelConfig
from pipeline.evaluation.examples import Settings
from pipeline.evaluation.scoring import Scorer
from pipeline.evaluation.sources import read_file
from pipeline.evaluation.tasks import prepare_task
from tests.pipeline.evaluation.conftest import ALONE, ARC, HELLASWAG, LAMBADA, PIQA, WINOGRANDE, measure, write_lines


def prompts(name: str, path: Path, model: ModelConfig, tokenizer: Tokenizer, **settings: Any) -> list[list[str]]:
    """Return what the model is shown: context and continuation, separated by a bar."""
    task = prepare_task(name, str(path), Settings(**settings), model, ALONE)
    decode = tokenizer.decode
    return [[f"{decode(one.context)}|{decode(one.continuation)}" for one in group] for group in task.groups]


def test_rows_may_be_an_array(tmp_path: Path) -> None:
    rows = [{"query": "x", "choices": ["a", "b"], "gold": 0}, {"query": "y", "choices": ["a", "b"], "gold": 1}]
    for name in ("rows.json", "rows.ndjson", "ROWS.JSONL"):
        (tmp_path / name).write_text(json.dumps(rows, indent=1))
        assert read_file(tmp_path / name).rows == rows
    (tmp_path / "rows.jsonl.gz").write_bytes(b"\x1f\x8b")
    with pytest.raises(DataError, match=r"rows\.jsonl\.gz is compressed; decompress it"):
        read_file(tmp_path / "rows.jsonl.gz")


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
        ("own", {"contexts": ["one", "1 "], "continuation": "two", "gold": 1}, ["one| two", "1| two"]),
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
        (
            '{"goal": "x", "sol1": "a", "sol2": "b", "label": 2}',
            "label is 2; it must be the number of the right choice, 0 to 1",
        ),
        ('{"goal": "x", "sol1": "a", "sol2": "b", "label": "?"}', 'label is "\\?"; it must be the number'),
        ('{"query": "x", "choices": ["a", "b"], "gold": "A"}', 'gold is "A"; it must be the number of the right'),
        ('{"query": "x", "choices": ["a", "b"], "gold": true}', "gold is true; it must be the number of the right"),
        ('{"query": "x", "choices": ["a", "b"], "gold": 0.5}', "gold is 0.5; it must be the number of the right"),
        ('{"query": "x", "choices": ["a", "b"], "gold": -1}', "gold is -1; it must be the number of the right"),
        ('{"query": "x", "choices": "ab", "gold": 0}', 'choices is "ab"; it must be a list of texts'),
        ('{"query": "x", "choices": ["a", 2], "gold": 0}', r'choices is \["a", 2\]; it must be a list of texts'),
        ('{"query": "x", "choices": [], "gold": 0}', r"choices is \[\]; it must be a list of texts"),
        ('{"query": "x", "choices": ["a"], "gold": 0}', "choices has one text; a choice needs at least two"),
        ('{"query": null, "choices": ["a", "b"], "gold": 0}', "query is null; it must be a text"),
        ('{"goal": "x", "sol1": "", "sol2": "b", "label": 0}', r"row 1 .*\(choice 1 is empty\)"),
        (
            '{"query": "x", "choices": ["a", "b"], "gold": 0}\n{"query": "x", "choices": ["a", " \\n"], "gold": 0}',
            r"row 2 .*\(choice 2 is empty\)",
        ),
        ("{]\n", "line 1 is not JSON"),
        ("[1]\n", "line 1 is a list"),
        ("", "is empty"),
    ],
)
def test_unusable_rows(content: str, expected: str, scorer: Scorer, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(content)
    with pytest.raises(DataError, match=expected):
        measure(scorer, "piqa", tmp_path / "rows.jsonl")


@pytest.mark.parametrize(
    ("name", "row", "expected"),
    [
        ("own", {"context": "a", "continuation": ""}, "the text to score is empty"),
        ("own", {"context": "a", "continuation": " "}, "the text to score is empty"),
        ("own", {"contexts": ["a", "b"], "continuation": "", "gold": 0}, "the text to score is empty"),
        ("own", {"contexts": ["a", ""], "continuation": "c", "gold": 0}, "choice 2 is empty"),
        ("lambada", {"text": "The last word is "}, "the text to score is empty"),
        ("lambada", {"text": "Alone"}, "no space before its last word"),
        ("lambada", {"context": "a", "continuation": 3}, "continuation is 3; it must be a text"),
        ("winogrande", {**WINOGRANDE, "option2": ""}, "choice 2 is empty"),
        ("winogrande", {**WINOGRANDE, "sentence": "It ends with _"}, "the text to score is empty"),
        ("winogrande", {**WINOGRANDE, "answer": ""}, 'answer is ""; it must be the number of the right choice, 1 to 2'),
        ("hellaswag", {**HELLASWAG, "endings": ["a", "b", "", "d"]}, "choice 3 is empty"),
        ("hellaswag_completion", {**HELLASWAG, "label": "4"}, 'label is "4"; it must be the number'),
        ("arc_easy", {**ARC, "answerKey": "E"}, 'answerKey is "E"; it must be one of A, B, C'),
        ("arc_easy", {**ARC, "choices": ["a"]}, r'choices is \["a"\]; it must be an object with text and label'),
        ("arc_easy", {"question": "Wet?"}, "no choices"),
    ],
)
def test_a_row_that_is_no_example_is_named(
    name: str, row: dict[str, Any], expected: str, scorer: Scorer, tmp_path: Path
) -> None:
    path = write_lines(tmp_path / "rows.jsonl", [row])
    with pytest.raises(DataError, match=rf"rows.jsonl: row 1 has .*{expected}"):
        prepare_task(name, str(path), Settings(), scorer.model, ALONE)
