"""Tasks that are texts: how well the model predicts them, by token, by word, by byte."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from data_tools.errors import DataError
from pipeline.errors import ConfigError
from pipeline.evaluation.intervals import BOOTSTRAP, bootstrap_ratio
from pipeline.evaluation.prepared import Groups, PreparedTask, Scores, Settings, TaskData, facts_of
from pipeline.evaluation.requests import rolling_windows
from pipeline.evaluation.sources import Row
from pipeline.metrics import perplexity


@dataclass(frozen=True)
class TextTask:
    """Perplexities of whole texts, each scored from its first token on, after ``<|endoftext|>``.

    Words and bytes are those of the text as it was given, before ``detokenize``: the model is judged by what it was to
    predict, not by how that was prepared. (lm-evaluation-harness' ``wikitext``, version 2.)

    Args:
        split: cuts a file's text into texts of their own.
    """

    protocol: str
    detokenize: Callable[[str], str] = str
    split: Callable[[str], list[str]] = lambda text: [text]

    def prepare(self, name: str, data: TaskData, settings: Settings) -> PreparedTask:
        """Cut the texts into windows.

        Raises:
            DataError: a row is no text.
            ConfigError: few-shot examples, or a stride beyond the context.
        """
        if settings.shots:
            raise ConfigError(f"--shots {settings.shots}: {name} is a text and has no examples to show; leave it out")
        stride = settings.stride or data.context_length
        if stride > data.context_length:
            raise ConfigError(f"--stride {stride} skips tokens: the model's context is {data.context_length}")
        texts = [text for row in data.rows.rows for text in self.split(_text_of(row, data))][: settings.limit]
        groups: Groups = []
        for text in texts:
            tokens = data.tokenizer.encode(self.detokenize(text)).tolist()
            windows = rolling_windows(tokens, data.tokenizer.end_of_text, data.context_length, stride)
            groups.append(list(windows))
        moving = f"windows of {data.context_length} tokens, moved on by {stride}"
        facts = facts_of(f"{self.protocol}; {moving}", data, texts, settings)
        return PreparedTask(name, facts, groups, lambda scores: _figures(texts, groups, scores))


def _text_of(row: Row, data: TaskData) -> str:
    page = row.get("page")
    if not isinstance(page, str):
        raise DataError(f"{data.rows.origin}: a row has {', '.join(row)}; expected a text file, or rows with page")
    return page


def _figures(texts: Sequence[str], groups: Groups, scores: Scores) -> dict[str, Any]:
    """Perplexities, each exp of the loss of all texts over their tokens, words or bytes."""
    tokens = sum(len(window.continuation) for group in groups for window in group)
    words = sum(len(re.split(r"\s+", text)) for text in texts)
    size = sum(len(text.encode("utf-8")) for text in texts)
    loss = -sum(score.log_likelihood for group in scores for score in group)
    low, high = (bound * tokens for bound in bootstrap_ratio(*_units(groups, scores)))
    found: dict[str, Any] = {}
    for key, count in (("token", tokens), ("word", words), ("byte", size)):
        found[f"{key}_perplexity"] = perplexity(loss / count)
        found[f"{key}_perplexity_interval"] = [perplexity(low / count), perplexity(high / count)]
    return {
        **found,
        "bits_per_byte": loss / size / math.log(2),
        "tokens": tokens,
        "words": words,
        "utf8_bytes": size,
        "interval": f"{BOOTSTRAP} of {'texts' if len(groups) > 1 else 'windows'}, counts of words and bytes fixed",
    }


def _units(groups: Groups, scores: Scores) -> tuple[list[float], list[float]]:
    """Loss and tokens of what the bootstrap draws: texts, or the windows of a single one."""
    windows = [
        [(-score.log_likelihood, len(window.continuation)) for score, window in zip(of_scores, group, strict=True)]
        for of_scores, group in zip(scores, groups, strict=True)
    ]
    units = windows if len(windows) > 1 else [[window] for window in windows[0]]
    return [sum(loss for loss, _ in unit) for unit in units], [sum(n for _, n in unit) for unit in units]
