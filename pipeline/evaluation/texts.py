"""Measure the perplexity of whole texts, which are scored in windows."""

import logging
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from data_tools.errors import DataError, list_names
from pipeline.errors import ConfigError
from pipeline.evaluation.examples import TaskData
from pipeline.evaluation.intervals import BOOTSTRAP, TOO_FEW, bootstrap_ratio
from pipeline.evaluation.packing import Request
from pipeline.evaluation.protocols import Figures, PreparedTask, Scores, facts_of
from pipeline.evaluation.sources import Row, as_json
from pipeline.run_folder.metrics import perplexity

log = logging.getLogger(__name__)


def rolling_windows(tokens: list[int], first: int, context_length: int, stride: int) -> Iterator[Request]:
    """Split a text into windows, so that each token is scored exactly once.

    The token ``first`` is the context of the text's first token. The first window scores at most ``context_length``
    tokens. Each later window scores the next ``stride`` tokens. Earlier tokens fill the rest of the window.

    ``get_rolling_token_windows`` of lm-evaluation-harness returns the same windows with
    ``context_len=context_length-stride+1``.
    """
    assert 1 <= stride <= context_length
    done = 0
    while done < len(tokens):
        end = min(len(tokens), done + (stride if done else context_length))
        start = end - context_length - 1  # the start of the model's input in ``tokens``; -1 is the token ``first``
        context = tokens[max(start, 0) : done] if start >= 0 else [first, *tokens[:done]]
        yield Request(tuple(context), tuple(tokens[done:end]))
        done = end


@dataclass(frozen=True)
class TextTask:
    """A task that measures the perplexity of whole texts.

    The first token of a text has the context ``<|endoftext|>``. Words and bytes are counted before ``detokenize``, as
    in lm-evaluation-harness.

    Args:
        detokenize: converts a text to ordinary text before it is encoded.
        split: splits the content of a file into texts.
    """

    protocol: str
    detokenize: Callable[[str], str] = str
    split: Callable[[str], list[str]] = lambda text: [text]

    def prepare(self, name: str, data: TaskData) -> PreparedTask:
        """Encode the texts and split the tokens into windows. Empty texts are left out.

        Raises:
            DataError: a row has no text, or all texts are empty.
            ConfigError: the settings ask for few-shot examples, or the stride is larger than the context length.
        """
        settings = data.settings
        if settings.shots:
            raise ConfigError(f"--shots {settings.shots}: a text has no examples to show; leave it out")
        length = data.context_length
        stride = settings.stride or length
        if stride > length:
            raise ConfigError(f"--stride {stride} skips tokens: the model's context is {length}")
        texts, empty = self._read_texts(data)
        if empty:
            log.warning("%s: %d empty texts of %s are left out", name, empty, data.rows.origin)
        windows: list[list[Request]] = []  # per text
        for text in texts:
            tokens = data.tokenizer.encode(self.detokenize(text)).tolist()
            windows.append(list(rolling_windows(tokens, data.tokenizer.end_of_text, length, stride)))
        protocol = f"{self.protocol}; windows of {length} tokens, moved on by {stride}"
        facts = {**facts_of(protocol, data, len(texts)), "empty_texts_left_out": empty}
        groups = [[window] for text_windows in windows for window in text_windows]  # windows have no common prefix
        return PreparedTask(
            name,
            facts,
            groups,
            lambda scores: _text_figures(texts, windows, scores),
            lambda scores: _describe_texts(texts, windows, scores),
        )

    def _read_texts(self, data: TaskData) -> tuple[list[str], int]:
        texts = [text for number, row in enumerate(data.rows.rows) for text in self._texts_of(row, data, number)]
        filled = [text for text in texts if self.detokenize(text)]
        if not filled:
            raise DataError(f"{data.rows.origin}: all texts are empty; there is nothing to score")
        return filled[: data.settings.limit], len(texts) - len(filled)

    def _texts_of(self, row: Row, data: TaskData, number: int) -> list[str]:
        if isinstance(row.get("page"), str):  # an article of WikiText from the hub
            return [row["page"]]
        if isinstance(row.get("text"), str):
            return self.split(row["text"]) or [""]
        reason = f"text is {as_json(row['text'])}" if "text" in row else f"has {list_names(row)}"
        raise DataError(f"{data.rows.where(number)}: {reason}; expected a text file, or rows with a text")


def _losses_of_windows(windows: list[list[Request]], scores: Scores) -> list[list[tuple[float, int]]]:
    """Return (loss, number of tokens) for each window, as one list per text."""
    losses = iter([-score.log_likelihood for (score,) in scores])
    return [[(next(losses), len(window.continuation)) for window in of_text] for of_text in windows]


def _describe_texts(texts: Sequence[str], windows: list[list[Request]], scores: Scores) -> list[Figures]:
    return [
        {
            "example": number,
            "log_likelihoods": [-sum(loss for loss, _ in unit)],
            "tokens": sum(count for _, count in unit),
            **_size(text),
        }
        for number, (text, unit) in enumerate(zip(texts, _losses_of_windows(windows, scores), strict=True), 1)
    ]


def _size(text: str) -> dict[str, int]:
    return {"words": len(re.split(r"\s+", text)), "utf8_bytes": len(text.encode("utf-8"))}


def _text_figures(texts: Sequence[str], windows: list[list[Request]], scores: Scores) -> Figures:
    units, unit = _losses_of_windows(windows, scores), "texts"
    if len(units) == 1:  # the bootstrap resamples texts, or the windows of a single text
        units, unit = [[window] for window in units[0]], "windows"
    losses = [sum(loss for loss, _ in of_unit) for of_unit in units]
    counts = [sum(count for _, count in of_unit) for of_unit in units]
    loss, tokens = sum(losses), sum(counts)
    words, size = (sum(_size(text)[key] for text in texts) for key in ("words", "utf8_bytes"))
    bounds = bootstrap_ratio(losses, counts)
    figures: Figures = {}
    for key, count in (("token", tokens), ("word", words), ("byte", size)):
        figures[f"{key}_perplexity"] = perplexity(loss / count)
        figures[f"{key}_perplexity_interval"] = (
            [perplexity(bound * tokens / count) for bound in bounds] if bounds else None
        )
    return {
        **figures,
        "bits_per_byte": loss / size / math.log(2),
        "tokens": tokens,
        "words": words,
        "utf8_bytes": size,
        "interval": f"{BOOTSTRAP} of {unit}, counts of words and bytes fixed" if bounds else TOO_FEW,
    }
