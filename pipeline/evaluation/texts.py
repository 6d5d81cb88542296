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
from pipeline.evaluation.prepared import PreparedTask, Scores, Settings, TaskData, facts_of
from pipeline.evaluation.requests import Request, rolling_windows
from pipeline.evaluation.sources import Row
from pipeline.run_folder.metrics import perplexity


@dataclass(frozen=True)
class TextTask:
    """Perplexities of whole texts, each scored from its first token on, after ``<|endoftext|>``.

    Words and bytes are those of the text as it was given, before ``detokenize``: the model is judged by what it was to
    predict, not by how that was prepared. (lm-evaluation-harness' ``wikitext``, version 2.)

    Args:
        split: cuts what a file holds into texts of their own.
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
            raise ConfigError(f"--shots {settings.shots}: a text has no examples to show; leave it out")
        stride = settings.stride or data.context_length
        if stride > data.context_length:
            raise ConfigError(f"--stride {stride} skips tokens: the model's context is {data.context_length}")
        texts = [text for row in data.rows.rows for text in self._texts_of(row, data)][: settings.limit]
        windows: list[list[Request]] = []  # of each text
        for text in texts:
            tokens = data.tokenizer.encode(self.detokenize(text)).tolist()
            windows.append(list(rolling_windows(tokens, data.tokenizer.end_of_text, data.context_length, stride)))
        moving = f"windows of {data.context_length} tokens, moved on by {stride}"
        facts = facts_of(f"{self.protocol}; {moving}", data, texts, settings)
        alone = [[window] for of_text in windows for window in of_text]  # windows do not begin alike
        return PreparedTask(name, facts, alone, lambda scores: _figures(texts, windows, scores))

    def _texts_of(self, row: Row, data: TaskData) -> list[str]:
        """A ``page`` is one text already, as the hub has WikiText's articles."""
        if isinstance(row.get("page"), str):
            return [row["page"]]
        if isinstance(row.get("text"), str):
            return self.split(row["text"])
        raise DataError(f"{data.rows.origin}: a row has {', '.join(row)}; expected a text file, or rows with text")


def _figures(texts: Sequence[str], windows: list[list[Request]], scores: Scores) -> dict[str, Any]:
    """Perplexities, each exp of the loss of all texts over their tokens, words or bytes."""
    losses = iter([-score.log_likelihood for (score,) in scores])
    units = [[(next(losses), len(window.continuation)) for window in of_text] for of_text in windows]
    loss, tokens = (sum(column) for column in zip(*(window for unit in units for window in unit), strict=True))
    if len(units) == 1:
        units = [[window] for window in units[0]]
    words = sum(len(re.split(r"\s+", text)) for text in texts)
    size = sum(len(text.encode("utf-8")) for text in texts)
    drawn = [[sum(column) for column in zip(*unit, strict=True)] for unit in units]
    low, high = (bound * tokens for bound in bootstrap_ratio(*zip(*drawn, strict=True)))
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
        "interval": f"{BOOTSTRAP} of {'texts' if len(texts) > 1 else 'windows'}, counts of words and bytes fixed",
    }
