"""Define the named text tasks, such as ``hellaswag``, and prepare tasks for scoring."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast, get_args

from data_tools.errors import DataError
from data_tools.shards.manifest import TokenizerRecord
from data_tools.tokenizer import load_tokenizer
from data_tools.vocabulary import GPT2_VOCAB_SIZE
from pipeline.checkpoint.loading import describe_other_vocabulary
from pipeline.config.schema import ModelConfig, TaskName
from pipeline.distributed.world import World
from pipeline.errors import ConfigError
from pipeline.evaluation import examples
from pipeline.evaluation.core import PreparedCore, prepare_core
from pipeline.evaluation.examples import Reader, Settings, TaskData
from pipeline.evaluation.protocols import (
    ChoiceTask,
    ContinuationTask,
    PreparedTask,
    encode_apart,
)
from pipeline.evaluation.results import CORE, VALIDATION
from pipeline.evaluation.sources import HubData, Rows, read_file, read_hub
from pipeline.evaluation.texts import TextTask

TaskProtocol = ChoiceTask | ContinuationTask | TextTask
Prepared = PreparedTask | PreparedCore


def detokenize(page: str) -> str:
    """Return a WikiText article with normal spacing: ``1 @.@ 5 m ( 5 ft )`` becomes ``1.5 m (5 ft)``.

    The rules and their order are those of lm-evaluation-harness.
    """
    page = page.replace("s '", "s'")
    for mark in "-,.":
        page = page.replace(f" @{mark}@ ", mark)
    for mark in ":;.!?,":
        page = page.replace(f" {mark} ", f"{mark} ")
    for opening, closing in ("()", "[]", "{}", '""', "''"):
        spaced = rf"{re.escape(opening)}\s*([^{re.escape(closing)}]*?)\s*{re.escape(closing)}"
        page = re.sub(spaced, rf"{opening}\1{closing}", page)
    for heading in ("= = = =", "= = =", "= ="):
        page = page.replace(heading, heading.replace(" ", ""))
    for old, new in ((" ° ", "°"), (" \n", "\n"), ("\n ", "\n"), (" N ", " 1 "), (" 's", "'s")):
        page = page.replace(old, new)
    return page


def split_pages(text: str) -> list[str]:
    """Return the articles of a WikiText file. Each article begins with a title line, `` = Title = ``."""
    pages: list[list[str]] = [[]]
    for line in text.split("\n"):
        stripped = line.strip()
        if stripped.startswith("= ") and stripped.endswith(" =") and not stripped.startswith("= ="):
            pages.append([])
        pages[-1].append(line)
    return [page for page in map("\n".join, pages) if page.strip()]


@dataclass(frozen=True)
class NamedTask:
    """A task with a name. If the user gives no file, the task reads its dataset from the Hugging Face Hub."""

    protocol: TaskProtocol
    hub: HubData
    by_line: bool = False  # whether each line of a text file is an example


_HARNESS = "lm-evaluation-harness"


def _multiple_choice(name: str, read: Reader) -> ChoiceTask:
    return ChoiceTask(f"{_HARNESS} {name}: acc by log-likelihood, acc_norm per character", read)


_HELLASWAG = HubData("Rowan/hellaswag", None, "validation", "train")

#: All tasks with a name, without two: ``validation`` scores token shards, and ``core`` consists of several tasks.
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
        by_line=True,
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

#: The protocols for tasks that are not in NAMED_TASKS. The columns of a task's file determine the protocol.
_PROTOCOLS_BY_COLUMNS: tuple[tuple[set[str], TaskProtocol], ...] = (
    ({"query", "choices", "gold"}, _multiple_choice("multiple_choice", examples.any_choices)),
    (
        {"context", "continuation"},
        ContinuationTask(
            f"{_HARNESS} loglikelihood: continuations, greedy and by log-likelihood", examples.any_continuation
        ),
    ),
    (
        {"contexts", "continuation", "gold"},
        ChoiceTask(
            "contexts: partial scoring (Trinh and Le 2018) of one continuation after several contexts",
            examples.any_contexts,
            normalised_by=None,
        ),
    ),
    ({"text"}, TextTask(f"{_HARNESS} loglikelihood_rolling: the text as it stands")),
)


def check_tasks(
    tasks: Sequence[str], settings: Settings, files: Mapping[str, str], run_files: Mapping[str, str]
) -> None:
    """Raise ConfigError if a task cannot be run, or if an option would have no effect.

    Each task must be one of the project's tasks (``TaskName``), or must have a file.

    Args:
        files: the files that the user gave with ``--data``, by task.
        run_files: the files in the run's ``evaluation.data``, by task.
    """
    for task in tasks:
        if list(tasks).count(task) > 1:
            raise ConfigError(f"--tasks: {task} is given more than once; give it once")
        if task not in get_args(TaskName) and task not in files and task not in run_files:
            raise ConfigError(
                f"--tasks {task}: no such task; there are: {', '.join(get_args(TaskName))}; "
                f"a file of your own takes any name with --data {task}=FILE"
            )
    given = [(f"--data {task}={path}", task) for task, path in files.items()]
    given += [(f"--limit {task}={limit}", task) for task, limit in settings.limits.items()]
    for option, task in given:
        if task not in tasks:
            raise ConfigError(f"{option}: {task} is not among --tasks {' '.join(tasks)}; add it there")
    if VALIDATION in settings.limits:
        raise ConfigError(f"--limit {VALIDATION}: this task scores the whole split of token shards; leave it out")
    unused = {"--shots": settings.shots, "--limit": settings.limit, "--stride": settings.stride}
    for option, value in unused.items():
        if value and set(tasks) == {VALIDATION}:
            raise ConfigError(f"{option} {value}: {VALIDATION} has no examples; leave it out, or name other --tasks")


def prepare_task(
    name: str,
    path: str | None,
    settings: Settings,
    model: ModelConfig,
    world: World,
    tokenizer: TokenizerRecord | None = None,
) -> Prepared:
    """Read and encode the examples of a task.

    Every rank must call this function. If one of them raises an error, all ranks do.

    Args:
        path: the file with the examples. None means the task's dataset on the hub.
        tokenizer: the tokenizer of the training data, or None if it is unknown.

    Raises:
        ConfigError: the model's vocabulary is not GPT-2's, or the task does not support an option in ``settings``.
        DataError: the examples cannot be read, or do not have the form that the task needs.
    """
    if problem := describe_other_vocabulary(model, tokenizer):
        raise ConfigError(f"{name}: {problem}; text needs a model of GPT-2's vocabulary, {GPT2_VOCAB_SIZE}")
    settings = settings.of(name)
    if name == CORE:
        return world.call_on_each(lambda: prepare_core(path, settings, settings.label(name)))
    named = NAMED_TASKS.get(cast(TaskName, name))
    if path is not None:
        by_line = named is not None and named.by_line
        rows = pool = world.call_on_each(lambda: read_file(Path(path), by_line=by_line))
        spare_shot = True
    else:
        assert named is not None, f"{name} needs a file"
        hub = named.hub
        rows = pool = read_hub(hub, world)
        if settings.shots and hub.shots_split:
            pool = read_hub(replace(hub, split=hub.shots_split), world)
        spare_shot = pool is rows or hub.split != "test"
    tokenize = world.call_on_each(load_tokenizer)  # may download the vocabulary
    data = TaskData(rows, pool, spare_shot, settings, tokenize, model.context_length)
    protocol = named.protocol if named else _protocol_of(rows)
    return protocol.prepare(settings.label(name), data)


def _protocol_of(rows: Rows) -> TaskProtocol:
    for columns, protocol in _PROTOCOLS_BY_COLUMNS:
        if columns <= rows.rows[0].keys():
            return protocol
    raise DataError(
        f"{rows.where(0)} has {', '.join(rows.rows[0])}; expected query, choices, gold; "
        "context, continuation; contexts, continuation, gold; or text"
    )
