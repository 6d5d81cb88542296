"""A task on its data, encoded and ready to be scored, however often."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from data_tools.errors import DataError
from data_tools.tokenizer import Tokenizer
from pipeline.evaluation.examples import ChoiceExample, ContinuationExample
from pipeline.evaluation.requests import Request, Score
from pipeline.evaluation.scoring import Scorer
from pipeline.evaluation.shots import draw_shots
from pipeline.evaluation.sources import Row, Rows

Example = TypeVar("Example", ChoiceExample, ContinuationExample)
Groups = list[list[Request]]  # of requests that may begin alike
Scores = list[list[Score]]  # in the shape of the groups


@dataclass(frozen=True)
class Settings:
    """What a person chooses about a task."""

    shots: int = 0
    limit: int | None = None  # the first so many examples
    stride: int | None = None  # of windows over texts, in tokens (None: the model's context, without overlap)

    def label(self, task: str) -> str:
        """The name under which results are kept: not that of the whole task unless they are of it."""
        shots = f"_{self.shots}shot" if self.shots else ""
        limit = f"_first{self.limit}" if self.limit else ""
        stride = f"_stride{self.stride}" if self.stride else ""
        return f"{task}{shots}{limit}{stride}"


@dataclass(frozen=True)
class TaskData:
    """What a task is made of: its rows, those that few-shot examples come from, and how text becomes tokens."""

    rows: Rows
    pool: Rows
    spare_shot: bool  # see ``draw_shots``
    tokenizer: Tokenizer
    context_length: int


@dataclass(frozen=True)
class PreparedTask:
    """What to score, and what follows from the scores."""

    name: str
    facts: dict[str, Any]  # protocol, data and their hash, counts
    groups: Groups
    figures: Callable[[Scores], dict[str, Any]]

    def measure(self, scorer: Scorer) -> dict[str, Any]:
        """Facts and figures, as JSON values, the same on every rank. Collective."""
        length = scorer.model.context_length
        truncated = sum(request.is_truncated(length) for group in self.groups for request in group)
        return {**self.facts, **self.figures(scorer.score(self.groups, self.name)), "truncated_requests": truncated}


def read_examples(
    data: TaskData, settings: Settings, read: Callable[[Row], Example]
) -> tuple[list[Example], list[str]]:
    """The examples to score, and the few-shot text before each.

    Raises:
        DataError: a row is not of the task's shape, or there are too few for the few-shot examples.
    """
    examples = _read_rows(data.rows, read, settings.limit)
    if not settings.shots:
        return examples, [""] * len(examples)
    pool = _read_rows(data.pool, read, None)
    shots = draw_shots(examples, pool, settings.shots, spare=data.spare_shot)
    return examples, ["".join(shot.shot for shot in drawn) for drawn in shots]


def _read_rows(rows: Rows, read: Callable[[Row], Example], limit: int | None) -> list[Example]:
    examples = []
    for number, row in enumerate(rows.rows[:limit]):
        try:
            examples.append(read(row))
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            shape = " ".join((read.__doc__ or "").split("\n")[0].replace("``", "").split())
            raise DataError(
                f"{rows.where(number)} has {', '.join(row)} and is no example of this task ({_reason(error)}); "
                f"expected {shape}"
            ) from error
    return examples


def _reason(error: Exception) -> str:
    return f"no {error.args[0]}" if isinstance(error, KeyError) else str(error)


@contextmanager
def naming_row(rows: Rows, number: int) -> Iterator[None]:
    """Errors about an example's text begin with its row."""
    try:
        yield
    except DataError as error:
        raise DataError(f"{rows.where(number)}: {error}") from error


def facts_of(protocol: str, data: TaskData, examples: Sequence[object], settings: Settings) -> dict[str, Any]:
    """What stands beside every figure."""
    return {
        "protocol": protocol,
        "data": data.rows.origin,
        "data_sha256": data.rows.sha256,
        "examples": len(examples),
        "shots": settings.shots,
        "limit": settings.limit,
    }
