"""From the name of a task to what can be scored."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import cast, get_args

from data_tools.tokenizer import GPT2_VOCAB_SIZE, load_tokenizer
from pipeline.config import ModelConfig, TaskName
from pipeline.distributed import World
from pipeline.errors import ConfigError
from pipeline.evaluation.catalogue import NAMED_TASKS, protocol_of
from pipeline.evaluation.prepared import PreparedTask, Settings, TaskData
from pipeline.evaluation.sources import Rows, read_file, read_hub


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
    rows, pool = _read(name, path, settings, world)
    named = NAMED_TASKS.get(cast(TaskName, name))
    protocol = named.protocol if named else protocol_of(rows)
    data = TaskData(rows, pool, load_tokenizer(), model.context_length)
    return protocol.prepare(settings.label(name), data, settings)


def _read(name: str, path: str | None, settings: Settings, world: World) -> tuple[Rows, Rows]:
    """The rows of a task, and those that few-shot examples come from."""
    if path is not None:
        rows = read_file(Path(path))
        return rows, rows
    hub = NAMED_TASKS[cast(TaskName, name)].hub
    rows = read_hub(hub, hub.split, world)
    if not settings.shots or hub.shots_split is None:
        return rows, rows
    return rows, read_hub(hub, hub.shots_split, world)
