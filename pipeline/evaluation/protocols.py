"""Define the kinds of text tasks: convert examples to scoring requests, and scores to figures."""

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from data_tools.errors import DataError
from data_tools.tokenizer import Tokenizer
from pipeline.errors import ConfigError
from pipeline.evaluation.examples import Example, TaskData, read_examples
from pipeline.evaluation.intervals import BOOTSTRAP, NORMAL, WILSON, bootstrap_ratio, normal_mean, wilson
from pipeline.evaluation.packing import Request
from pipeline.evaluation.scoring import Score, Scorer
from pipeline.evaluation.sources import Row
from pipeline.run_folder.metrics import perplexity

Groups = list[list[Request]]  # the requests of a group may have a common prefix
Scores = list[list[Score]]  # one score per request, nested like ``Groups``
Figures = dict[str, Any]
Encode = Callable[[Tokenizer, str, str], Request]
TaskProtocol: TypeAlias = "ChoiceTask | ContinuationTask | TextTask"


@dataclass(frozen=True)
class PreparedTask:
    """A task whose examples are read and encoded. It can be measured several times."""

    name: str
    facts: dict[str, Any]  # protocol, data, hash of the data, and counts
    groups: Groups
    figures: Callable[[Scores], Figures]

    def measure(self, scorer: Scorer) -> dict[str, Any]:
        """Return facts and figures as JSON values. Every rank returns equal values.

        This call is collective: every rank must make it.
        """
        length = scorer.model.context_length
        truncated = sum(request.is_truncated(length) for group in self.groups for request in group)
        return {**self.facts, **self.figures(scorer.score(self.groups, self.name)), "truncated_requests": truncated}


def encode_pair(tokenizer: Tokenizer, context: str, continuation: str) -> Request:
    """Encode a context and its continuation as one text, and split the tokens after the length of the encoded context.

    White space at the end of the context moves to the continuation, because GPT-2's tokens begin with white space.
    An empty context becomes ``<|endoftext|>``. ``TemplateLM.loglikelihood`` and ``_encode_pair`` of
    lm-evaluation-harness do the same.

    Raises:
        DataError: the continuation has no token, or the context contains only white space.
    """
    kept = context.rstrip()
    if context and not kept:
        raise DataError("the context is only white space; leave it empty, or give it a word")
    continuation = context[len(kept) :] + continuation
    before = tokenizer.encode(kept).tolist()
    whole = tokenizer.encode(kept + continuation).tolist()
    return _request(before or [tokenizer.end_of_text], whole[len(before) :], continuation)


def encode_apart(tokenizer: Tokenizer, context: str, continuation: str) -> Request:
    """Encode a context and its continuation separately, like build-nanogpt for HellaSwag.

    Raises:
        DataError: the context or the continuation has no token.
    """
    before = tokenizer.encode(context).tolist()
    if not before:
        raise DataError("the context is empty")
    return _request(before, tokenizer.encode(continuation).tolist(), continuation)


def _request(context: list[int], continuation: list[int], text: str) -> Request:
    if not continuation:
        raise DataError(f"the continuation {text!r} has no token of its own; give it at least one character")
    return Request(tuple(context), tuple(continuation))


def rolling_windows(tokens: list[int], first: int, context_length: int, stride: int) -> Iterator[Request]:
    """Split a text into windows that score each token once.

    The first window scores up to ``context_length`` tokens after the token ``first``. Each later window scores the
    next ``stride`` tokens, and its context is as long as the model allows. ``get_rolling_token_windows`` of
    lm-evaluation-harness does the same with ``context_len = context_length - stride + 1``.
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
class ChoiceTask:
    """A task whose answer is the likeliest of several continuations.

    ``acc`` compares the log-likelihoods of the choices. ``acc_norm`` compares the log-likelihoods divided by the
    lengths of the choices.

    Args:
        normalised_by: the unit of the lengths, "characters" (as in lm-evaluation-harness) or "tokens". If None, the
            task has no ``acc_norm``.
    """

    protocol: str
    read: Callable[[Row], Example]
    encode: Encode = encode_pair
    normalised_by: str | None = "characters"

    def prepare(self, name: str, data: TaskData) -> PreparedTask:
        """Read and encode the examples. Raises DataError if a row cannot be used."""
        examples, groups = _read_and_encode(data, self.read, self.encode)
        facts = _facts(self.protocol, data, len(examples))
        return PreparedTask(name, facts, groups, lambda scores: self._figures(examples, groups, scores))

    def _figures(self, examples: Sequence[Example], groups: Groups, scores: Scores) -> Figures:
        figures: Figures = {}
        for key, answers in self.answers(examples, groups, scores).items():
            right = sum(answer == example.gold for answer, example in zip(answers, examples, strict=True))
            figures |= _accuracy(key, right, len(examples))
        return {**figures, "interval": WILSON}

    def answers(self, examples: Sequence[Example], groups: Groups, scores: Scores) -> dict[str, list[int]]:
        """Return the model's choice in each example, by ``acc`` and ``acc_norm``. In a tie, return the first choice."""
        rows = [np.array([score.log_likelihood for score in group]) for group in scores]
        answers = {"acc": [int(row.argmax()) for row in rows]}
        if self.normalised_by:
            if self.normalised_by == "tokens":
                lengths = [[len(request.continuation) for request in group] for group in groups]
            else:
                lengths = [[max(len(choice), 1) for choice in example.choices] for example in examples]
            answers["acc_norm"] = [int((row / length).argmax()) for row, length in zip(rows, lengths, strict=True)]
        return answers


@dataclass(frozen=True)
class ContinuationTask:
    """A task with one right continuation per example.

    ``acc`` is the fraction of continuations in which every token is the argmax. ``perplexity`` is exp of the mean
    negative log-likelihood per continuation, not per token.
    """

    protocol: str
    read: Callable[[Row], Example]

    def prepare(self, name: str, data: TaskData) -> PreparedTask:
        """Read and encode the examples. Raises DataError if a row cannot be used."""
        examples, groups = _read_and_encode(data, self.read, encode_pair)
        return PreparedTask(name, _facts(self.protocol, data, len(examples)), groups, _continuation_figures)


def _continuation_figures(scores: Scores) -> Figures:
    losses = [-score.log_likelihood for (score,) in scores]
    return {
        **_accuracy("acc", sum(score.is_greedy for (score,) in scores), len(scores)),
        "perplexity": perplexity(float(np.mean(losses))),
        "perplexity_interval": [perplexity(loss) for loss in normal_mean(losses)],
        "interval": f"acc: {WILSON}; perplexity: {NORMAL}",
    }


@dataclass(frozen=True)
class TextTask:
    """A task that measures perplexities of whole texts. All tokens of a text are scored, after ``<|endoftext|>``.

    Words and bytes are counted in the original text, before ``detokenize``, so that figures stay comparable. Version 2
    of ``wikitext`` in lm-evaluation-harness counts in this way too.

    Args:
        detokenize: converts a text to ordinary text before it is encoded.
        split: splits the content of a file into texts.
    """

    protocol: str
    detokenize: Callable[[str], str] = str
    split: Callable[[str], list[str]] = lambda text: [text]

    def prepare(self, name: str, data: TaskData) -> PreparedTask:
        """Encode the texts and split them into windows.

        Raises:
            DataError: a row has no text.
            ConfigError: few-shot examples are requested, or the stride is longer than the context.
        """
        settings = data.settings
        if settings.shots:
            raise ConfigError(f"--shots {settings.shots}: a text has no examples to show; leave it out")
        length = data.context_length
        stride = settings.stride or length
        if stride > length:
            raise ConfigError(f"--stride {stride} skips tokens: the model's context is {length}")
        texts = [text for row in data.rows.rows for text in self._texts_of(row, data)][: settings.limit]
        windows: list[list[Request]] = []  # per text
        for text in texts:
            tokens = data.tokenizer.encode(self.detokenize(text)).tolist()
            windows.append(list(rolling_windows(tokens, data.tokenizer.end_of_text, length, stride)))
        protocol = f"{self.protocol}; windows of {length} tokens, moved on by {stride}"
        facts = _facts(protocol, data, len(texts))
        groups = [[window] for text_windows in windows for window in text_windows]  # windows have no common prefix
        return PreparedTask(name, facts, groups, lambda scores: _text_figures(texts, windows, scores))

    def _texts_of(self, row: Row, data: TaskData) -> list[str]:
        if isinstance(row.get("page"), str):  # an article of WikiText from the hub
            return [row["page"]]
        if isinstance(row.get("text"), str):
            return self.split(row["text"])
        raise DataError(f"{data.rows.origin}: a row has {', '.join(row)}; expected a text file, or rows with text")


def _text_figures(texts: Sequence[str], windows: list[list[Request]], scores: Scores) -> Figures:
    """Return the perplexity (exp of the mean loss) per token, per word and per byte, and the counts."""
    window_losses = iter([-score.log_likelihood for (score,) in scores])
    units = [[(next(window_losses), len(window.continuation)) for window in of_text] for of_text in windows]
    if len(units) == 1:  # the bootstrap resamples texts, or the windows of a single text
        units = [[window] for window in units[0]]
    losses = [sum(loss for loss, _ in unit) for unit in units]
    counts = [sum(count for _, count in unit) for unit in units]
    loss, tokens = sum(losses), sum(counts)
    words = sum(len(re.split(r"\s+", text)) for text in texts)
    size = sum(len(text.encode("utf-8")) for text in texts)
    low, high = (bound * tokens for bound in bootstrap_ratio(losses, counts))
    figures: Figures = {}
    for key, count in (("token", tokens), ("word", words), ("byte", size)):
        figures[f"{key}_perplexity"] = perplexity(loss / count)
        figures[f"{key}_perplexity_interval"] = [perplexity(low / count), perplexity(high / count)]
    return {
        **figures,
        "bits_per_byte": loss / size / math.log(2),
        "tokens": tokens,
        "words": words,
        "utf8_bytes": size,
        "interval": f"{BOOTSTRAP} of {'texts' if len(texts) > 1 else 'windows'}, counts of words and bytes fixed",
    }


def _read_and_encode(data: TaskData, read: Callable[[Row], Example], encode: Encode) -> tuple[list[Example], Groups]:
    examples, prefixes = read_examples(data, read)
    groups = []
    for number, (example, prefix) in enumerate(zip(examples, prefixes, strict=True)):
        try:
            groups.append([encode(data.tokenizer, prefix + before, after) for before, after in example.pairs])
        except DataError as error:
            raise DataError(f"{data.rows.where(number)}: {error}") from error
    return examples, groups


def _facts(protocol: str, data: TaskData, examples: int) -> dict[str, Any]:
    return {
        "protocol": protocol,
        "data": data.rows.origin,
        "data_sha256": data.rows.sha256,
        "examples": examples,
        "shots": data.settings.shots,
        "limit": data.settings.limit,
    }


def _accuracy(key: str, right: int, examples: int) -> Figures:
    return {key: right / examples, f"{key}_interval": list(wilson(right, examples))}
