"""Named tasks, and tasks from files, are read and prepared."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import get_args

import datasets
import pytest

from data_tools.errors import DataError
from data_tools.tokenizer import Tokenizer
from pipeline.config.schema import TaskName
from pipeline.errors import ConfigError
from pipeline.evaluation.examples import Settings
from pipeline.evaluation.packing import Request
from pipeline.evaluation.scoring import Scorer
from pipeline.evaluation.tasks import NAMED_TASKS, check_task_names, prepare_task
from pipeline.model.gpt2 import GPT2
from tests.pipeline.conftest import tiny_model_config
from tests.pipeline.evaluation.conftest import ALONE, PIQA, measure, plain_score, write_lines


def test_every_task_but_validation_has_a_dataset() -> None:
    assert set(NAMED_TASKS) == set(get_args(TaskName)) - {"validation"}


def test_an_unknown_name_needs_a_file() -> None:
    check_task_names(["piqa", "own"], {"own": "file"})
    with pytest.raises(ConfigError, match="--tasks own: no such task; there are: validation, wikitext2"):
        check_task_names(["own"], {})


def test_text_needs_gpt2s_vocabulary(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "rows.jsonl", PIQA)
    with pytest.raises(ConfigError, match="piqa: model.vocab_size is 89"):
        prepare_task("piqa", str(path), Settings(), tiny_model_config(), ALONE)


def test_shots_come_from_the_training_split_of_the_hub(monkeypatch: pytest.MonkeyPatch, scorer: Scorer) -> None:
    splits = {"validation": PIQA[:2], "train": [{"goal": "GOAL", "sol1": "ONE", "sol2": "TWO", "label": 1}] * 2}
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, split: splits[split])
    model = scorer.model.model_copy(update={"context_length": 1000})
    task = prepare_task("piqa", None, Settings(shots=1), model, ALONE)
    assert json.dumps(task.facts["data"]) == '"baber/piqa, validation"'
    assert all(len(request.context) > 15 for group in task.groups for request in group)


def test_an_error_names_the_split_of_the_shots(monkeypatch: pytest.MonkeyPatch, scorer: Scorer) -> None:
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, split: {"validation": PIQA}[split])
    with pytest.raises(DataError, match="cannot load baber/piqa, train from the Hugging Face hub"):
        prepare_task("piqa", None, Settings(shots=1), scorer.model, ALONE)


def test_wikitext_is_detokenized_article_by_article(
    text_model: GPT2, scorer: Scorer, tokenizer: Tokenizer, tmp_path: Path
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
