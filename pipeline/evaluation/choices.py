"""Tasks in which the likeliest of several continuations is the model's answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from data_tools.tokenizer import Tokenizer
from pipeline.evaluation.examples import ChoiceExample
from pipeline.evaluation.intervals import WILSON, wilson
from pipeline.evaluation.prepared import (
    Groups,
    PreparedTask,
    Scores,
    Settings,
    TaskData,
    facts_of,
    naming_row,
    read_examples,
)
from pipeline.evaluation.requests import Request, encode_pair
from pipeline.evaluation.sources import Row


@dataclass(frozen=True)
class ChoiceTask:
    """``acc`` compares the log-likelihoods of the choices; ``acc_norm`` these divided by the choices' lengths.

    Args:
        normalised_by: "characters" as in lm-evaluation-harness, or "tokens"; None: there is no ``acc_norm``.
    """

    protocol: str
    read: Callable[[Row], ChoiceExample]
    encode: Callable[[Tokenizer, str, str], Request] = encode_pair
    normalised_by: str | None = "characters"

    def prepare(self, name: str, data: TaskData, settings: Settings) -> PreparedTask:
        """Read and encode the examples.

        Raises:
            DataError: a row cannot be used.
        """
        examples, prefixes = read_examples(data, settings, self.read)
        groups: Groups = []
        for number, (example, prefix) in enumerate(zip(examples, prefixes, strict=True)):
            with naming_row(data.rows, number):
                groups.append([self.encode(data.tokenizer, prefix + before, after) for before, after in example.pairs])
        facts = facts_of(self.protocol, data, examples, settings)
        return PreparedTask(name, facts, groups, lambda scores: self._figures(examples, groups, scores))

    def _figures(self, examples: Sequence[ChoiceExample], groups: Groups, scores: Scores) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, answers in self.answers(examples, groups, scores).items():
            hits = sum(answer == example.gold for answer, example in zip(answers, examples, strict=True))
            found |= {key: hits / len(examples), f"{key}_interval": list(wilson(hits, len(examples)))}
        return {**found, "interval": WILSON}

    def answers(self, examples: Sequence[ChoiceExample], groups: Groups, scores: Scores) -> dict[str, list[int]]:
        """The model's choice in each example, by ``acc`` and ``acc_norm``; the first of equally likely ones."""
        rows = [np.array([score.log_likelihood for score in of_example]) for of_example in scores]
        answers = {"acc": [int(row.argmax()) for row in rows]}
        if self.normalised_by:
            lengths = self._lengths(examples, groups)
            answers["acc_norm"] = [int((row / length).argmax()) for row, length in zip(rows, lengths, strict=True)]
        return answers

    def _lengths(self, examples: Sequence[ChoiceExample], groups: Groups) -> list[list[int]]:
        if self.normalised_by == "tokens":
            return [[len(request.continuation) for request in group] for group in groups]
        return [[max(len(choice), 1) for choice in example.choices] for example in examples]
