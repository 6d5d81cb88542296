"""From the name of a task to what can be scored."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import cast, get_args

from data_tools.tokenizer import GPT2_VOCAB_SIZE, load_tokenizer
from pipeline.config.schema import ModelConfig, TaskName
from pipeline.distributed.world import World
from pipeline.errors import ConfigError
from pipeline.evaluation.catalogue import NAMED_TASKS, protocol_of
from pipeline.evaluation.prepared import PreparedTask, Settings, TaskData
from pipeline.evaluation.sources import read_file, read_hub


def expect_known_tasks(tasks: Sequence[str], data: Mapping[str, str]) -> None:
    """Refuse names that are neither those of tasks nor of files.

    Raises:
        ConfigError: names the tasks that there are.
    """
    for task in tasks:
        if task not in get_args(TaskName) and task not in data:
            raise ConfigError(
                f"--tasks {task}: no such task; there are: {', '.join(get_args(TaskName))}; "
                f"a file of your own takes any name with --data {task}=FILE"
            )


def prepare_task(name: str, path: str | None, settings: Settings, model: ModelConfig, world: World) -> PreparedTask:
    """A task on its data. Collective.

    Args:
        path: its file; None: the dataset of the hub.

    Raises:
        ConfigError: the model's tokens are not GPT-2's, or the task lacks an option of ``settings``.
        DataError: the data cannot be had or used.
    """
    if model.vocab_size != GPT2_VOCAB_SIZE:
        raise ConfigError(
            f"{name}: model.vocab_size is {model.vocab_size}; "
            f"text needs a model of GPT-2's vocabulary, {GPT2_VOCAB_SIZE}"
        )
    data = _read(name, path, settings, model, world)
    named = NAMED_TASKS.get(cast(TaskName, name))
    protocol = named.protocol if named else protocol_of(data.rows)
    return protocol.prepare(settings.label(name), data, settings)


def _read(name: str, path: str | None, settings: Settings, model: ModelConfig, world: World) -> TaskData:
    """The rows of a task, and those that few-shot examples come from: its training split, else the rows themselves."""
    if path is not None:
        rows = read_file(Path(path))
        return TaskData(rows, rows, True, load_tokenizer(), model.context_length)
    hub = NAMED_TASKS[cast(TaskName, name)].hub
    rows = pool = read_hub(hub, hub.split, world)
    if settings.shots and hub.shots_split:
        pool = read_hub(hub, hub.shots_split, world)
    return TaskData(rows, pool, pool is rows or hub.split != "test", load_tokenizer(), model.context_length)
