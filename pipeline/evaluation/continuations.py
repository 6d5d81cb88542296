"""Tasks with one right continuation: does the model write it, and how likely does it find it?"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.evaluation.examples import ContinuationExample
from pipeline.evaluation.intervals import NORMAL, WILSON, normal_mean, wilson
from pipeline.evaluation.prepared import PreparedTask, Scores, Settings, TaskData, facts_of, naming_row, read_examples
from pipeline.evaluation.requests import encode_pair
from pipeline.evaluation.sources import Row
from pipeline.run_folder.metrics import perplexity


@dataclass(frozen=True)
class ContinuationTask:
    """``acc``: every token of the continuation is the likeliest. ``perplexity``: exp of the mean negative
    log-likelihood of whole continuations, not of their tokens."""

    protocol: str
    read: Callable[[Row], ContinuationExample]

    def prepare(self, name: str, data: TaskData, settings: Settings) -> PreparedTask:
        """As ``ChoiceTask.prepare``."""
        examples, prefixes = read_examples(data, settings, self.read)
        groups = []
        for number, (example, prefix) in enumerate(zip(examples, prefixes, strict=True)):
            with naming_row(data.rows, number):
                groups.append([encode_pair(data.tokenizer, prefix + example.context, example.continuation)])
        return PreparedTask(name, facts_of(self.protocol, data, examples, settings), groups, _figures)


def _figures(scores: Scores) -> dict[str, Any]:
    hits = sum(score.is_greedy for (score,) in scores)
    losses = [-score.log_likelihood for (score,) in scores]
    return {
        "acc": hits / len(scores),
        "acc_interval": list(wilson(hits, len(scores))),
        "perplexity": perplexity(float(np.mean(losses))),
        "perplexity_interval": [perplexity(loss) for loss in normal_mean(losses)],
        "interval": f"acc: {WILSON}; perplexity: {NORMAL}",
    }
