"""Named tasks, and tasks from files, are read and prepared."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any, get_args

import datasets
import pytest

from data_tools.errors import DataError
from data_tools.shards.manifest import other_tokenizer
from data_tools.tokenizer import Tokenizer
from pipeline.config.schema import ModelConfig, TaskName
from pipeline.errors import ConfigError
from pipeline.evaluation.examples import Settings
from pipeline.evaluation.packing import Request
from pipeline.evaluation.scoring import Scorer
from pipeline.evaluation.tasks import NAMED_TASKS, check_tasks, prepare_task
from pipeline.model.gpt2 import GPT2
from tests.pipeline.conftest import tiny_model_config
from tests.pipeline.evaluation.conftest import ALONE, PIQA, measure, plain_score, write_lines


def test_every_task_but_validation_has_a_dataset() -> None:
    assert set(NAMED_TASKS) == set(get_args(TaskName)) - {"validation", "core"}


def test_an_unknown_name_needs_a_file() -> None:
    check_tasks(["piqa", "own"], Settings(), {"own": "file"}, {"not asked for": "file"})
    check_tasks(["own"], Settings(), {}, {"own": "file"})
    with pytest.raises(ConfigError, match="--tasks own: no such task; there are: validation, wikitext2"):
        check_tasks(["own"], Settings(), {}, {})


@pytest.mark.parametrize(
    ("tasks", "settings", "files", "expected"),
    [
        (["piqa"], {}, {"own": "missing"}, "--data own=missing: own is not among --tasks piqa; add it there"),
        (["validation"], {}, {"piqa": "file"}, "--data piqa=file: piqa is not among --tasks validation"),
        (["piqa"], {"limits": {"lambada": 3}}, {}, "--limit lambada=3: lambada is not among --tasks piqa"),
        (["validation", "piqa"], {"limits": {"validation": 3}}, {}, "--limit validation: this task scores the whole"),
        (["validation"], {"limit": 3}, {}, "--limit 3: validation has no examples"),
        (["validation"], {"shots": 3}, {}, "--shots 3: validation has no examples"),
        (["piqa", "piqa"], {}, {}, "--tasks: piqa is given more than once"),
        (["validation"], {"stride": 3}, {}, "--stride 3: validation has no examples"),
    ],
)
def test_an_option_without_effect_is_refused(
    tasks: list[str], settings: dict[str, Any], files: dict[str, str], expected: str
) -> None:
    with pytest.raises(ConfigError, match=expected):
        check_tasks(tasks, Settings(**settings), files, {})


def test_a_task_can_have_its_own_limit(scorer: Scorer, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "rows.jsonl", PIQA)
    settings = Settings(limit=5, limits={"piqa": 2})
    task = prepare_task("piqa", str(path), settings, scorer.model, ALONE)
    assert (task.name, task.facts["examples"]) == ("piqa_first2", 2)
    assert settings.of("lambada") == Settings(limit=5)


def test_text_needs_gpt2s_vocabulary(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "rows.jsonl", PIQA)
    with pytest.raises(ConfigError, match="piqa: model.vocab_size is 89"):
        prepare_task("piqa", str(path), Settings(), tiny_model_config(), ALONE)
    with pytest.raises(ConfigError, match="piqa: the model's tokens are of the tokenizer 'other'"):
        prepare_task("piqa", str(path), Settings(), ModelConfig(), ALONE, other_tokenizer(50257))


def test_shots_come_from_the_training_split_of_the_hub(monkeypatch: pytest.MonkeyPatch, scorer: Scorer) -> None:
    splits = {"validation": PIQA[:2], "train": [{"goal": "GOAL", "sol1": "ONE", "sol2": "TWO", "label": 1}] * 2}
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, split: splits[split])
    model = scorer.model.model_copy(update={"context_length": 1000})
    task = prepare_task("piqa", None, Settings(shots=1), model, ALONE)
    assert json.dumps(task.facts["data"]) == '"hf://datasets/baber/piqa, validation"'
    assert all(len(request.context) > 15 for group in task.groups for request in group)


def test_an_error_names_the_split_of_the_shots(monkeypatch: pytest.MonkeyPatch, scorer: Scorer) -> None:
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, split: {"validation": PIQA}[split])
    with pytest.raises(DataError, match="cannot load hf://datasets/baber/piqa, train from the Hugging Face hub"):
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
