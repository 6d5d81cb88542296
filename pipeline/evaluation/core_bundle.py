"""Read nanochat's folder ``eval_bundle``: the tasks of CORE, their examples, and their prompts.

Prompts and few-shot examples are those of ``nanochat/core_eval.py`` and ``scripts/base_eval.py``.
"""

import csv
import random
from collections.abc import Sequence
from dataclasses import dataclass
from os.path import commonprefix
from pathlib import Path
from typing import Any

import yaml

from data_tools.errors import DataError, one_line_read_errors
from data_tools.tokenizer import Tokenizer
from data_tools.vocabulary import END_OF_TEXT
from pipeline.evaluation.examples import SHOT_SEPARATOR, Example, read_rows, reads
from pipeline.evaluation.packing import Request
from pipeline.evaluation.results import CORE
from pipeline.evaluation.scoring import Score
from pipeline.evaluation.sources import Row, index_field, read_file, text_field, texts_field

TASKS_FILE, BASELINES_FILE, DATA_FOLDER = "core.yaml", "eval_meta_data.csv", "eval_data"

_ORDER_SEED, _SHOTS_SEED = 1337, 1234


@reads("query, choices, gold")
def _choices(row: Row) -> Example:
    query, choices = text_field(row, "query"), texts_field(row, "choices")
    return Example(tuple((query, choice) for choice in choices), index_field(row, "gold", len(choices)))


@reads("context_options, continuation, gold")
def _schema(row: Row) -> Example:
    contexts, continuation = texts_field(row, "context_options"), text_field(row, "continuation")
    return Example(tuple((context, continuation) for context in contexts), index_field(row, "gold", len(contexts)))


@reads("context, continuation")
def _continuation(row: Row) -> Example:
    return Example(((text_field(row, "context").strip(), text_field(row, "continuation")),))


_READERS = {"multiple_choice": _choices, "schema": _schema, "language_modeling": _continuation}


@dataclass(frozen=True)
class BundleTask:
    label: str
    kind: str  # a key of ``_READERS``
    delimiter: str  # the text between a context and its continuation
    shots: int
    baseline: float  # the accuracy of random answers, from 0 to 1
    examples: list[Example]  # in nanochat's order

    def centered(self, accuracy: float) -> float:
        """Return the centered accuracy: 0 for random answers, 1 if all answers are right."""
        return (accuracy - self.baseline) / (1 - self.baseline)

    def prefix(self, number: int) -> str:
        """Return the text of the few-shot examples for the example with the index ``number``.

        They are drawn from the other examples of the task. ``number`` determines the seed of the draw.
        """
        others = [i for i in range(len(self.examples)) if i != number]
        drawn = random.Random(_SHOTS_SEED + number).sample(others, self.shots)
        return "".join(self._join(*self.examples[i].pairs[self.examples[i].gold]) + SHOT_SEPARATOR for i in drawn)

    def _join(self, context: str, continuation: str) -> str:
        return f"{context}{self.delimiter}{continuation}"

    def requests(self, number: int, tokenizer: Tokenizer, context_length: int) -> list[Request]:
        """Return one request per pair (context and continuation) of an example.

        The kind of the task determines which tokens are scored:

        - ``multiple_choice``: the tokens after the common beginning of all pairs.
        - ``schema``: the tokens of the common end of all pairs.
        - ``language_modeling``: the tokens after the context.

        If a request is longer than ``context_length``, its first tokens are left out.

        Raises:
            DataError: the scored tokens of a request do not fit into ``context_length``.
        """

        def encode(text: str) -> list[int]:
            return [END_OF_TEXT, *tokenizer.encode(text).tolist()]

        prefix, pairs = self.prefix(number), self.examples[number].pairs
        tokens = [encode(prefix + self._join(*pair)) for pair in pairs]
        if self.kind == "schema":
            shared = len(commonprefix([row[::-1] for row in tokens]))
            starts = [max(len(row) - shared, 1) for row in tokens]
        else:
            before = [encode((prefix + self._join(context, "")).strip()) for context, _ in pairs if len(pairs) == 1]
            starts = [len(commonprefix([*tokens, *before]))] * len(tokens)
        return [
            self._request(row, min(start, len(row) - 1), context_length, number)
            for row, start in zip(tokens, starts, strict=True)
        ]

    def _request(self, tokens: list[int], start: int, context_length: int, number: int) -> Request:
        left_out = max(len(tokens) - context_length, 0)
        if left_out >= start:
            raise DataError(
                f"{CORE}: example {number + 1} of {self.label} scores {len(tokens) - start} tokens, which do not fit "
                f"into the model's context of {context_length}; use a model with a longer context"
            )
        return Request(tuple(tokens[left_out:start]), tuple(tokens[start:]))

    def answer(self, requests: Sequence[Request], scores: Sequence[Score]) -> int:
        """Return the index of the choice with the highest mean log-likelihood per scored token.

        With only one request, return 0 (right) if greedy decoding generates its continuation, and 1 (wrong) otherwise.
        """
        if len(scores) == 1:
            return int(not scores[0].is_greedy)
        means = [score.log_likelihood / len(r.continuation) for r, score in zip(requests, scores, strict=True)]
        return means.index(max(means))


def read_bundle(folder: Path, limit: int | None) -> list[BundleTask]:
    """Read and check the tasks of a bundle.

    Args:
        limit: the number of examples per task, taken from the start of nanochat's shuffled order. None means all.

    Raises:
        DataError: a file is missing or cannot be used.
    """
    baselines = _read_baselines(folder / BASELINES_FILE)
    return [
        _read_task(folder, entry, baselines, limit, f"{folder / TASKS_FILE}: task {number}")
        for number, entry in enumerate(_read_entries(folder / TASKS_FILE), 1)
    ]


def _read_entries(path: Path) -> list[dict[str, Any]]:
    try:
        with one_line_read_errors(path):
            content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: is not YAML ({' '.join(str(error).split())[:120]})") from error
    entries = content.get("icl_tasks") if isinstance(content, dict) else None
    if not isinstance(entries, list) or not entries or not all(isinstance(entry, dict) for entry in entries):
        raise DataError(f"{path}: must have icl_tasks, a list of tasks; expected the file of nanochat's eval_bundle")
    return entries


def _read_baselines(path: Path) -> dict[str, float]:
    """Return the accuracy of random answers by task, from 0 to 1. The file contains percentages."""
    with one_line_read_errors(path), open(path, encoding="utf-8", newline="") as file:
        try:
            return {row["Eval Task"]: float(row["Random baseline"]) / 100 for row in csv.DictReader(file)}
        except (KeyError, ValueError, TypeError) as error:
            raise DataError(f"{path}: needs the columns Eval Task and Random baseline, a percentage") from error


def _read_task(
    folder: Path, entry: dict[str, Any], baselines: dict[str, float], limit: int | None, where: str
) -> BundleTask:
    try:
        label, kind, file = str(entry["label"]), entry["icl_task_type"], folder / DATA_FOLDER / entry["dataset_uri"]
        shots = int(entry["num_fewshot"][0])
        delimiter = str(entry.get("continuation_delimiter", " "))
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise DataError(
            f"{where} needs label, icl_task_type, dataset_uri and num_fewshot, a list of numbers"
        ) from error
    if kind not in _READERS:
        raise DataError(f"{where} ({label}): icl_task_type is {kind}; it must be one of {', '.join(_READERS)}")
    if not 0 <= baselines.get(label, 1.0) < 1:
        raise DataError(f"{where} ({label}): {BASELINES_FILE} has no random baseline from 0 to below 100 for it")
    examples = read_rows(read_file(file), _READERS[kind])
    random.Random(_ORDER_SEED).shuffle(examples)
    examples = examples[:limit]
    if len(examples) <= shots:
        raise DataError(
            f"{where} ({label}): {file} has {len(examples)} examples, too few for {shots} few-shot examples"
        )
    return BundleTask(label, kind, delimiter, shots, baselines[label], examples)
