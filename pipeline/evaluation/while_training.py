"""Tasks measured on a model while it trains, by the forward pass of whatever backend trains it."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from pipeline.backends import Backend
from pipeline.config.schema import Config
from pipeline.distributed.world import World
from pipeline.evaluation.preparation import prepare_task
from pipeline.evaluation.prepared import PreparedTask, Settings
from pipeline.evaluation.results import INTERVAL, VALIDATION
from pipeline.evaluation.scoring import Scorer
from pipeline.run_folder.metrics import TASK_PREFIX

log = logging.getLogger(__name__)


def prepare_tasks(config: Config, world: World) -> dict[str, PreparedTask]:
    """The tasks of ``evaluation.tasks`` on their first ``max_examples``, without ``validation``. Collective.

    Raises:
        UserError: as ``prepare_task``.
    """
    options = config.evaluation
    settings = Settings(limit=options.max_examples)
    return {
        name: prepare_task(name, options.data.get(name), settings, config.model, world)
        for name in options.tasks
        if name != VALIDATION
    }


def measure_tasks(
    tasks: Mapping[str, PreparedTask], backend: Backend, config: Config, world: World
) -> dict[str, float]:
    """The figures of all tasks as keys of a row of metrics. Collective; in ``backend.evaluation_mode()``."""
    scorer = Scorer(backend, config.model, world, config.batch.micro_batch_size * config.seq_len)
    row: dict[str, float] = {}
    for name, task in tasks.items():
        result = task.measure(scorer)
        figures = {key: value for key, value in result.items() if isinstance(value, float)}
        row |= {f"{TASK_PREFIX}{name}_{key}": value for key, value in figures.items()}
        log.info("%s | %d examples", _one_line(task.name, figures, result), result["examples"])
    return row


def _one_line(name: str, figures: dict[str, float], result: dict[str, Any]) -> str:
    parts = []
    for key, value in figures.items():
        low, high = result.get(key + INTERVAL, (None, None))
        parts.append(f"{key} {value:.4f}" + (f" [{low:.4f}, {high:.4f}]" if low is not None else ""))
    return " | ".join([name, *parts])
