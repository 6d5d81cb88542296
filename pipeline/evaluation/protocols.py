"""Define tasks with several choices per example, and tasks with one right continuation per example."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from data_tools.errors import DataError
from data_tools.tokenizer import Tokenizer
from pipeline.errors import ConfigError
from pipeline.evaluation.examples import Example, Reader, TaskData, read_examples
from pipeline.evaluation.intervals import NORMAL, TOO_FEW, WILSON, normal_mean, wilson
from pipeline.evaluation.packing import Request
from pipeline.evaluation.results import INTERVAL
from pipeline.evaluation.scoring import Score, Scorer
from pipeline.run_folder.metrics import perplexity

log = logging.getLogger(__name__)

Groups = list[list[Request]]  # the requests of a group may have a common prefix
Scores = list[list[Score]]  # one score per request, nested like ``Groups``
Figures = dict[str, Any]
Encode = Callable[[Tokenizer, str, str], Request]


@dataclass(frozen=True)
class PreparedTask:
    """A task whose examples are read and encoded, so that only the model's scores are missing."""

    name: str
    facts: dict[str, Any]  # protocol, data, hash of the data, and counts
    groups: Groups
    figures: Callable[[Scores], Figures]
    describe: Callable[[Scores], list[Figures]]  # the scores of each example, for ``--save-examples``

    def measure(self, scorer: Scorer) -> tuple[Figures, list[Figures]]:
        """Score the examples. Return the results, such as ``acc``, together with ``facts``, and each example's scores.

        Every rank must call this method.
        """
        length = scorer.model.context_length
        truncated = sum(request.is_truncated(length) for group in self.groups for request in group)
        scores = scorer.score(self.groups, self.name)
        with scorer.world.progress.patience():
            examples = [{"task": self.name, **example} for example in self.describe(scores)]
            return {**self.facts, **self.figures(scores), "truncated_requests": truncated}, examples


def encode_pair(tokenizer: Tokenizer, context: str, continuation: str) -> Request:
    """Encode a context and its continuation as one text, and split the tokens into context and continuation.

    The steps are those of ``TemplateLM.loglikelihood`` in lm-evaluation-harness:

    1. Move white space from the end of the context to the continuation. GPT-2's tokens contain the space before a word.
    2. Encode the context alone. It has N tokens.
    3. Encode the whole text, and split its tokens after N tokens.
    4. Replace an empty context by ``<|endoftext|>``.

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
    """Encode a context and its continuation separately, as build-nanogpt does for HellaSwag.

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


@dataclass(frozen=True)
class ChoiceTask:
    """A task in which the model chooses the most likely of several continuations or contexts.

    ``acc`` is the fraction of right choices. For ``acc_norm``, each log-likelihood is divided by the length of the
    choice.

    Args:
        normalised_by: the unit of the length: "characters" (as in lm-evaluation-harness) or "tokens". If None, the
            results have no ``acc_norm``.
    """

    protocol: str
    read: Reader
    encode: Encode = encode_pair
    normalised_by: str | None = "characters"

    def prepare(self, name: str, data: TaskData) -> PreparedTask:
        """Read and encode the examples.

        Raises:
            DataError: a row cannot be used.
            ConfigError: the settings contain ``stride``, which is only for tasks of whole texts.
        """
        examples, groups = _read_and_encode(data, self.read, self.encode)
        facts = facts_of(_protocol_of(name, self.protocol, examples), data, len(examples))
        return PreparedTask(
            name,
            facts,
            groups,
            lambda scores: self._figures(examples, groups, scores),
            lambda scores: self._describe(examples, groups, scores),
        )

    def _describe(self, examples: Sequence[Example], groups: Groups, scores: Scores) -> list[Figures]:
        answers = self.answers(examples, groups, scores)
        return [
            {
                "example": number + 1,
                "gold": example.gold,
                **{key.replace("acc", "choice"): chosen[number] for key, chosen in answers.items()},
                "log_likelihoods": [score.log_likelihood for score in scores[number]],
            }
            for number, example in enumerate(examples)
        ]

    def _figures(self, examples: Sequence[Example], groups: Groups, scores: Scores) -> Figures:
        figures: Figures = {}
        for key, answers in self.answers(examples, groups, scores).items():
            right = sum(answer == example.gold for answer, example in zip(answers, examples, strict=True))
            figures |= accuracy(key, right, len(examples))
        return {**figures, "interval": WILSON}

    def answers(self, examples: Sequence[Example], groups: Groups, scores: Scores) -> dict[str, list[int]]:
        """Return the index of the most likely choice for each example, under the keys ``acc`` and ``acc_norm``.

        For ``acc_norm``, each log-likelihood is first divided by the length of its choice, in the unit
        ``normalised_by``. If several choices are equally likely, return the first of them.
        """
        rows = [np.array([score.log_likelihood for score in group]) for group in scores]
        answers = {"acc": [int(row.argmax()) for row in rows]}
        if self.normalised_by:
            if self.normalised_by == "tokens":
                lengths = [[len(request.continuation) for request in group] for group in groups]
            else:
                lengths = [[len(choice) for choice in example.choices] for example in examples]
            answers["acc_norm"] = [int((row / length).argmax()) for row, length in zip(rows, lengths, strict=True)]
        return answers


@dataclass(frozen=True)
class ContinuationTask:
    """A task with one right continuation per example.

    ``acc`` is the fraction of continuations that greedy decoding generates exactly. ``perplexity`` is exp of the mean
    negative log-likelihood per continuation, not per token.
    """

    protocol: str
    read: Reader

    def prepare(self, name: str, data: TaskData) -> PreparedTask:
        """Read and encode the examples.

        Raises:
            DataError: a row cannot be used.
            ConfigError: the settings contain ``stride``, which is only for tasks of whole texts.
        """
        examples, groups = _read_and_encode(data, self.read, encode_pair)
        facts = facts_of(_protocol_of(name, self.protocol, examples), data, len(examples))
        return PreparedTask(name, facts, groups, _continuation_figures, _describe_continuations)


def _describe_continuations(scores: Scores) -> list[Figures]:
    return [
        {"example": number, "log_likelihoods": [score.log_likelihood], "is_greedy": score.is_greedy}
        for number, (score,) in enumerate(scores, 1)
    ]


def _continuation_figures(scores: Scores) -> Figures:
    losses = [-score.log_likelihood for (score,) in scores]
    bounds = normal_mean(losses)
    return {
        **accuracy("acc", sum(score.is_greedy for (score,) in scores), len(scores)),
        "perplexity": perplexity(float(np.mean(losses))),
        "perplexity_interval": [perplexity(bound) for bound in bounds] if bounds else None,
        "interval": f"acc: {WILSON}; perplexity: {NORMAL if bounds else TOO_FEW}",
    }


def _read_and_encode(data: TaskData, read: Reader, encode: Encode) -> tuple[list[Example], Groups]:
    if data.settings.stride:
        raise ConfigError(
            f"--stride {data.settings.stride}: {data.rows.origin} has no texts to score in windows; leave it out"
        )
    examples, prefixes = read_examples(data, read)
    groups = []
    for number, (example, prefix) in enumerate(zip(examples, prefixes, strict=True)):
        try:
            group = [encode(data.tokenizer, prefix + before, after) for before, after in example.pairs]
            longest = max(len(request.continuation) for request in group)
            if longest > data.context_length:
                raise DataError(
                    f"the text to score has {longest} tokens, more than the model's context of {data.context_length}; "
                    "shorten it, or give it as a text, which is scored in windows"
                )
        except DataError as error:
            raise DataError(f"{data.rows.where(number)}: {error}") from error
        groups.append(group)
    return examples, groups


def _protocol_of(name: str, protocol: str, examples: Sequence[Example]) -> str:
    """Return a task's protocol as text for the results. If prompts come from the user's file, the text says so."""
    count = sum(example.rendered_by_file for example in examples)
    if not count:
        return protocol
    origin = f"rendered by the file ({count} of {len(examples)} examples)"
    log.warning("%s: %s, so the figures are not those of the task's protocol", name, origin)
    return f"{origin}: {protocol.partition(': ')[2]}"


def facts_of(protocol: str, data: TaskData, examples: int) -> dict[str, Any]:
    """Return the part of a result that does not depend on the model."""
    return {
        "protocol": protocol,
        "data": data.rows.origin,
        "data_sha256": data.rows.sha256,
        "examples": examples,
        "shots": data.settings.shots,
        "limit": data.settings.limit,
    }


def accuracy(key: str, right: int, examples: int) -> Figures:
    """Return the share of right answers under ``key``, and its 95% interval."""
    return {key: right / examples, f"{key}{INTERVAL}": list(wilson(right, examples))}
