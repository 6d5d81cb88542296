"""The named tasks: what is read, from where, and how it is scored; and how a file without a name of its own is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from data_tools.errors import DataError
from pipeline.config.schema import TaskName
from pipeline.evaluation import examples
from pipeline.evaluation.choices import ChoiceTask
from pipeline.evaluation.continuations import ContinuationTask
from pipeline.evaluation.examples import ChoiceExample
from pipeline.evaluation.requests import encode_apart
from pipeline.evaluation.sources import HubData, Row, Rows
from pipeline.evaluation.texts import TextTask
from pipeline.evaluation.wikitext import detokenize, split_pages

Protocol = ChoiceTask | ContinuationTask | TextTask

_HARNESS = "lm-evaluation-harness"


@dataclass(frozen=True)
class NamedTask:
    """A protocol, and the data that it is usually run on."""

    protocol: Protocol
    hub: HubData


def _multiple_choice(name: str, read: Callable[[Row], ChoiceExample]) -> ChoiceTask:
    return ChoiceTask(f"{_HARNESS} {name}: acc by log-likelihood, acc_norm per character", read)


_HELLASWAG = HubData("Rowan/hellaswag", None, "validation", "train")

#: All tasks but ``validation``, which scores token shards.
NAMED_TASKS: dict[TaskName, NamedTask] = {
    "wikitext2": NamedTask(
        TextTask(
            f"{_HARNESS} wikitext: articles, detokenized; words and bytes of the original", detokenize, split_pages
        ),
        HubData("EleutherAI/wikitext_document_level", "wikitext-2-raw-v1", "test"),
    ),
    "lambada": NamedTask(
        ContinuationTask(f"{_HARNESS} lambada_openai: the last word, greedy and by log-likelihood", examples.lambada),
        HubData("EleutherAI/lambada_openai", "default", "test"),
    ),
    "hellaswag": NamedTask(_multiple_choice("hellaswag", examples.hellaswag), _HELLASWAG),
    "hellaswag_completion": NamedTask(
        ChoiceTask(
            "build-nanogpt hellaswag: endings encoded apart, acc by summed and acc_norm by mean loss of tokens",
            examples.hellaswag_completion,
            encode_apart,
            "tokens",
        ),
        _HELLASWAG,
    ),
    "piqa": NamedTask(_multiple_choice("piqa", examples.piqa), HubData("baber/piqa", None, "validation", "train")),
    "arc_easy": NamedTask(
        _multiple_choice("arc_easy", examples.arc), HubData("allenai/ai2_arc", "ARC-Easy", "test", "train")
    ),
    "arc_challenge": NamedTask(
        _multiple_choice("arc_challenge", examples.arc), HubData("allenai/ai2_arc", "ARC-Challenge", "test", "train")
    ),
    "winogrande": NamedTask(
        ChoiceTask(
            f"{_HARNESS} winogrande: partial scoring of what follows the blank", examples.winogrande, normalised_by=None
        ),
        HubData("allenai/winogrande", "winogrande_xl", "validation", "train"),
    ),
}

_SHAPES: tuple[tuple[set[str], Protocol], ...] = (
    ({"query", "choices", "gold"}, _multiple_choice("multiple_choice", examples.any_choices)),
    (
        {"context", "continuation"},
        ContinuationTask(
            f"{_HARNESS} loglikelihood: continuations, greedy and by log-likelihood", examples.any_continuation
        ),
    ),
    ({"text"}, TextTask(f"{_HARNESS} loglikelihood_rolling: the text as it stands")),
)


def protocol_of(rows: Rows) -> Protocol:
    """How rows of no named task are scored, by the keys of the first.

    Raises:
        DataError: they have no shape that is known.
    """
    for keys, protocol in _SHAPES:
        if keys <= rows.rows[0].keys():
            return protocol
    raise DataError(
        f"{rows.where(0)} has {', '.join(rows.rows[0])}; expected query, choices, gold; context, continuation; or text"
    )
