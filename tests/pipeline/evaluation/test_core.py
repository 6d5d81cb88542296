"""CORE equals the figure of a slow loop that follows nanochat: one forward pass per prompt, and plain mean losses."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from data_tools.errors import DataError
from data_tools.tokenizer import load_tokenizer
from data_tools.vocabulary import END_OF_TEXT
from pipeline.errors import ConfigError
from pipeline.evaluation import core
from pipeline.evaluation.core import CORE, prepare_core
from pipeline.evaluation.examples import Settings
from pipeline.evaluation.results import format_table, hash_folder
from pipeline.evaluation.scoring import Scorer
from pipeline.evaluation.tasks import prepare_task
from pipeline.model.gpt2 import GPT2
from tests.pipeline.evaluation.conftest import ALONE, CONTEXT, write_lines

WORDS = ["water", "a stone", "two birds", "the red house", "Écrire", "seven", "wind"]
#: Task -> kind, few-shot examples, random baseline in percent, and the text before the continuation.
TASKS = {
    "facts": ("multiple_choice", 3, 25.0, "\nAnswer: "),
    "pronouns": ("schema", 0, 50.0, " "),
    "words": ("language_modeling", 0, 0.0, ""),
}


@torch.no_grad()
def greedy_text(model: GPT2, context: str) -> str:
    """Return the text of the most likely token after a context."""
    tokens = torch.tensor([[END_OF_TEXT, *load_tokenizer().encode(context).tolist()]])
    return load_tokenizer().decode([int(model.logits(tokens)[0, -1].argmax())])


@pytest.fixture(scope="module")
def bundle(text_model: GPT2, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a small bundle. The model's own greedy tokens are among the continuations, so that some are right."""
    folder, draw = tmp_path_factory.mktemp("core") / "eval_bundle", random.Random(0)
    (folder / "eval_data").mkdir(parents=True)
    rows: dict[str, list[dict[str, Any]]] = {
        "facts": [
            {"query": f"Which is {n}?", "choices": draw.sample(WORDS, 4), "gold": draw.randrange(4)} for n in range(9)
        ],
        "pronouns": [
            {
                "context_options": [f"{a} met {b} as {a}", f"{a} met {b} as {b}"],
                "continuation": f"was number {n}.",
                "gold": n % 2,
            }
            for n, (a, b) in enumerate((draw.choice(WORDS), draw.choice(WORDS) + "s") for _ in range(7))
        ],
        "words": [{"context": f" Say {word}: ", "continuation": f" {word}"} for word in WORDS],
    }
    for row in rows["words"][:4]:
        row["continuation"] = greedy_text(text_model, row["context"].strip())
    lines = ["icl_tasks:"]
    for label, (kind, shots, _, delimiter) in TASKS.items():
        write_lines(folder / "eval_data" / f"{label}.jsonl", rows[label])
        lines += [f"- label: {label}", f"  icl_task_type: {kind}", f"  dataset_uri: {label}.jsonl"]
        lines += [f"  num_fewshot: [{shots}]"]
        lines += [] if delimiter == " " else [f"  continuation_delimiter: {json.dumps(delimiter)}"]
    (folder / "core.yaml").write_text("\n".join(lines) + "\n")
    table = ["Eval Task,Task Category,Random baseline"]
    table += [f"{label},any,{baseline}" for label, (_, _, baseline, _) in TASKS.items()]
    (folder / "eval_meta_data.csv").write_text("\n".join(table) + "\n")
    return folder


def in_order(folder: Path, label: str) -> list[dict[str, Any]]:
    """Return the rows in nanochat's order."""
    lines = (folder / "eval_data" / f"{label}.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    random.Random(1337).shuffle(rows)
    return rows


@torch.no_grad()
def losses_and_choices(model: GPT2, tokens: list[int]) -> tuple[torch.Tensor, list[int]]:
    """Return the loss of each token after the first, and the most likely token in its place."""
    logits = model.logits(torch.tensor([tokens]))[0, :-1]
    return F.cross_entropy(logits, torch.tensor(tokens[1:]), reduction="none"), logits.argmax(-1).tolist()


def is_right(model: GPT2, rows: list[dict[str, Any]], number: int, kind: str, shots: int, delimiter: str) -> bool:
    """Answer one example as nanochat does."""

    def parts(row: dict[str, Any]) -> list[tuple[str, str]]:
        if kind == "multiple_choice":
            return [(row["query"], choice) for choice in row["choices"]]
        if kind == "schema":
            return [(context, row["continuation"]) for context in row["context_options"]]
        return [(row["context"].strip(), row["continuation"])]

    others = [row for i, row in enumerate(rows) if i != number]
    drawn = random.Random(1234 + number).sample(others, shots)
    before = "".join(delimiter.join(parts(row)[row.get("gold", 0)]) + "\n\n" for row in drawn)
    prompts = [before + delimiter.join(pair) for pair in parts(rows[number])]
    if kind == "language_modeling":
        prompts.append((before + parts(rows[number])[0][0] + delimiter).strip())
    tokens = [[END_OF_TEXT, *load_tokenizer().encode(prompt).tolist()] for prompt in prompts]
    step = -1 if kind == "schema" else 1
    ordered = [row[::step] for row in tokens]
    shared = next(
        (i for i in range(min(map(len, ordered))) if len({row[i] for row in ordered}) > 1), min(map(len, ordered))
    )
    starts = [len(row) - shared if kind == "schema" else shared for row in tokens]
    means = []
    for row, start in zip(tokens, starts, strict=True):
        cut = max(len(row) - CONTEXT, 0)
        losses, choices = losses_and_choices(model, row[cut:])
        if kind == "language_modeling":
            return choices[start - cut - 1 :] == row[start:]
        means.append(losses[start - cut - 1 :].mean().item())
    return means.index(min(means)) == rows[number]["gold"]


def test_core_is_that_of_a_slow_loop(
    bundle: Path, scorer: Scorer, text_model: GPT2, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(core, "FEWEST_VALUES", 7)
    result, _ = prepare_core(str(bundle), Settings(), CORE).measure(scorer)
    centered = []
    for label, (kind, shots, baseline, delimiter) in TASKS.items():
        rows = in_order(bundle, label)
        right = sum(is_right(text_model, rows, n, kind, shots, delimiter) for n in range(len(rows)))
        figures = result["tasks"][label]
        assert figures["acc"] == right / len(rows), label
        assert (figures["examples"], figures["shots"]) == (len(rows), shots)
        centered.append((right / len(rows) - baseline / 100) / (1 - baseline / 100))
    assert result[CORE] == pytest.approx(sum(centered) / 3)
    low, high = result["core_interval"]
    assert low < result[CORE] < high
    assert 0 < result["truncated_requests"] < 9 * 4 + 7 * 2 + 7
    assert 0 < result["tasks"]["words"]["acc"] < 1


def test_core_is_a_task_like_others(bundle: Path, scorer: Scorer) -> None:
    prepared = prepare_task(CORE, str(bundle), Settings(limit=4, limits={}), scorer.model, ALONE)
    result, examples = prepared.measure(scorer)
    assert result["core_interval"] is None, "four examples are too few"
    assert prepared.name == "core_first4" and result["examples"] == len(examples) == 12
    for label in TASKS:
        of_task = [example for example in examples if example["core_task"] == label]
        right = [example.get("is_greedy", example.get("gold", 0) == example.get("choice", 1)) for example in of_task]
        assert result["tasks"][label]["acc"] == sum(right) / 4
    table = format_table({CORE: {"step": 1, "checkpoint": "here", **result}})
    assert "core" in table and "pronouns" in table and "centered" in table
    whole = prepare_core(str(bundle), Settings(), CORE)
    assert whole.facts["data_sha256"] == result["data_sha256"] == hash_folder(bundle) and not math.isnan(result[CORE])


def test_a_mistake_is_one_line(bundle: Path, scorer: Scorer, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="core: no data; unpack https://.*eval_bundle.zip and name the folder"):
        prepare_core(None, Settings(), CORE)
    with pytest.raises(ConfigError, match="--shots: core takes its few-shot counts from core.yaml"):
        prepare_core(str(bundle), Settings(shots=1), CORE)

    def damaged(name: str, change: Callable[[str], str]) -> str:
        copy = tmp_path / str(len(list(tmp_path.iterdir())))
        (copy / "eval_data").mkdir(parents=True)
        for path in bundle.rglob("*.*"):
            target = copy / path.relative_to(bundle)
            target.write_text(change(path.read_text()) if path.name == name else path.read_text())
        return str(copy)

    cases: list[tuple[str, Callable[[str], str], str]] = [
        ("core.yaml", lambda text: "a: [", "core.yaml: is not YAML"),
        ("core.yaml", lambda text: "tasks: []", "must have icl_tasks, a list of tasks"),
        ("core.yaml", lambda text: text.replace("schema", "poem"), r"task 2 \(pronouns\): icl_task_type is poem"),
        ("core.yaml", lambda text: text.replace("num_fewshot: [0]", "shots: 0"), "task 2 needs label, icl_task_type"),
        ("core.yaml", lambda text: text.replace("[3]", "[9]"), "has 9 examples, too few for 9 few-shot examples"),
        ("core.yaml", lambda text: text.replace("facts.jsonl", "no.jsonl"), "no.jsonl: No such file"),
        ("eval_meta_data.csv", lambda text: text.replace("pronouns", "nouns"), "no random baseline"),
        ("eval_meta_data.csv", lambda text: text.replace("25.0", "many"), "needs the columns Eval Task and Random"),
        (
            "facts.jsonl",
            lambda text: text.replace("gold", "label", 1),
            r"row 1 has .* \(no gold\); expected query, choices, gold",
        ),
    ]
    for name, change, expected in cases:
        with pytest.raises(DataError, match=expected):
            prepare_core(damaged(name, change), Settings(), CORE)
    long = prepare_core(
        damaged("words.jsonl", lambda text: text.replace('" seven"', '"' + " one" * 50 + '"')), Settings(), CORE
    )
    with pytest.raises(DataError, match=r"core: example \d of words scores \d+ tokens, which do not fit .* of 40"):
        long.measure(scorer)
    with pytest.raises(DataError, match="cannot read .*eval_meta_data.csv"):
        prepare_core(str(tmp_path / "nothing"), Settings(), CORE)
