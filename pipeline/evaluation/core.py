"""Measure CORE: the mean centered accuracy over the tasks of nanochat's folder ``eval_bundle``.

A task's centered accuracy is 0 for random answers, and 1 if all answers are right (Li et al. 2024, DataComp-LM, arXiv
2406.11794). Examples are scored as in ``nanochat/core_eval.py``.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from data_tools.tokenizer import load_tokenizer
from data_tools.vocabulary import END_OF_TEXT
from pipeline.errors import ConfigError
from pipeline.evaluation.core_bundle import TASKS_FILE, BundleTask, read_bundle
from pipeline.evaluation.examples import Settings
from pipeline.evaluation.intervals import FEWEST_VALUES, TOO_FEW, WILSON, Z_95
from pipeline.evaluation.packing import Request
from pipeline.evaluation.protocols import Figures, accuracy
from pipeline.evaluation.results import CORE, INTERVAL, hash_folder
from pipeline.evaluation.scoring import Score, Scorer

BUNDLE_URL = "https://karpathy-public.s3.us-west-2.amazonaws.com/eval_bundle.zip"

_PROTOCOL = "nanochat core_eval: choices by mean loss of tokens, continuations greedy; mean of centered accuracies"
_NORMAL = "95%, normal, from the accuracies"
_EXAMPLES_AT_ONCE = 256  # some tasks have 10,000 examples, whose requests together would need gigabytes


@dataclass(frozen=True)
class PreparedCore:
    """The tasks of nanochat's folder ``eval_bundle``. To save memory, each text is encoded just before its scoring."""

    name: str
    facts: Figures
    tasks: list[BundleTask]

    def measure(self, scorer: Scorer) -> tuple[Figures, list[Figures]]:
        """Return the CORE score with the results of each task, and the model's answer to each example.

        Every rank must call this method.
        """
        figures, examples, truncated = {}, [], 0
        for task in self.tasks:
            right = 0
            for number, requests, scores in _score(task, scorer):
                answer, gold = task.answer(requests, scores), task.examples[number].gold
                right += answer == gold
                truncated += sum(request.context[0] != END_OF_TEXT for request in requests)
                examples.append(_describe(self.name, task, number, answer, scores))
            figures[task.label] = _task_figures(task, right)
        return {**self.facts, **_summary(self.tasks, figures), "truncated_requests": truncated}, examples


def _score(task: BundleTask, scorer: Scorer) -> Iterator[tuple[int, list[Request], list[Score]]]:
    tokenizer = load_tokenizer()
    for first in range(0, len(task.examples), _EXAMPLES_AT_ONCE):
        numbers = range(first, min(first + _EXAMPLES_AT_ONCE, len(task.examples)))
        with scorer.world.progress.patience():
            groups = [task.requests(number, tokenizer, scorer.model.context_length) for number in numbers]
        yield from zip(numbers, groups, scorer.score(groups, f"{CORE}: {task.label}"), strict=True)


def _describe(name: str, task: BundleTask, number: int, answer: int, scores: Sequence[Score]) -> Figures:
    likelihoods = {"log_likelihoods": [score.log_likelihood for score in scores]}
    common = {"task": name, "core_task": task.label, "example": number + 1}
    if len(scores) == 1:
        return {**common, **likelihoods, "is_greedy": scores[0].is_greedy}
    return {**common, "gold": task.examples[number].gold, "choice": answer, **likelihoods}


def _task_figures(task: BundleTask, right: int) -> Figures:
    count = len(task.examples)
    return {
        **accuracy("acc", right, count),
        "centered": task.centered(right / count),
        "random_baseline": task.baseline,
        "shots": task.shots,
        "examples": count,
    }


def _summary(tasks: Sequence[BundleTask], figures: dict[str, Figures]) -> Figures:
    core = sum(each["centered"] for each in figures.values()) / len(tasks)
    variance = sum(
        figures[task.label]["acc"] * (1 - figures[task.label]["acc"]) / len(task.examples) / (1 - task.baseline) ** 2
        for task in tasks
    )
    margin = Z_95 * math.sqrt(variance) / len(tasks)
    is_known = min(len(task.examples) for task in tasks) >= FEWEST_VALUES
    return {
        CORE: core,
        f"{CORE}{INTERVAL}": [core - margin, core + margin] if is_known else None,
        "tasks": figures,
        "interval": f"{CORE}: {_NORMAL if is_known else TOO_FEW}; acc: {WILSON}",
    }


def prepare_core(path: str | None, settings: Settings, name: str) -> PreparedCore:
    """Read and check the tasks of a bundle.

    Args:
        path: the folder ``eval_bundle``.
        settings: ``limit`` is the number of examples per task, taken from the start of nanochat's shuffled order.

    Raises:
        ConfigError: ``path`` is None, or ``settings`` sets ``shots`` or ``stride``, which CORE does not use.
        DataError: a file is missing or cannot be used.
    """
    if path is None:
        raise ConfigError(f"{CORE}: no data; unpack {BUNDLE_URL} and name the folder: --data {CORE}=eval_bundle")
    if settings.shots or settings.stride:
        option = "--shots" if settings.shots else "--stride"
        raise ConfigError(
            f"{option}: {CORE} takes its few-shot counts from {TASKS_FILE} and has no texts; leave it out"
        )
    folder = Path(path)
    tasks = read_bundle(folder, settings.limit)
    facts = {
        "protocol": _PROTOCOL,
        "data": str(folder),
        "data_sha256": hash_folder(folder),
        "examples": sum(len(task.examples) for task in tasks),
        "limit": settings.limit,
    }
    return PreparedCore(name, facts, tasks)
