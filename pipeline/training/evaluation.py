"""Evaluate the model that is being trained: prepare the tasks before the first step, and measure them later."""

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch

from data_tools.formatting import count_of
from data_tools.shards.manifest import TokenizerRecord
from pipeline.backends import Backend
from pipeline.config.paths import find_path
from pipeline.config.schema import Config
from pipeline.data.datasets import TokenDataset
from pipeline.distributed.world import World
from pipeline.errors import TrainingError
from pipeline.evaluation.examples import Settings
from pipeline.evaluation.results import INTERVAL, VALIDATION
from pipeline.evaluation.scoring import Scorer
from pipeline.evaluation.tasks import Prepared, prepare_task
from pipeline.evaluation.validation import validate, validate_average
from pipeline.generation.text_generator import complete_while_training
from pipeline.run_folder.metrics import SAMPLE_KEY, TASK_PREFIX

log = logging.getLogger(__name__)


def prepare_tasks(config: Config, world: World, tokenizer: TokenizerRecord) -> dict[str, Prepared]:
    """Read and encode the examples of the tasks that a run scores during training (``evaluation.tasks``).

    The task ``validation`` is left out. Every rank must call this function.

    Args:
        tokenizer: the tokenizer of the training data.

    Raises:
        ConfigError: the model's vocabulary is not GPT-2's, or a task does not support ``evaluation.max_examples``.
        DataError: the data of a task cannot be used.
    """
    options = config.evaluation
    settings = Settings(limit=options.max_examples)
    paths = {task: find_path(path, config.run) for task, path in options.data.items()}
    return {
        name: prepare_task(name, paths.get(name), settings, config.model, world, tokenizer)
        for name in options.tasks
        if name != VALIDATION
    }


def evaluate_model(
    backend: Backend,
    datasets: Sequence[TokenDataset],
    tasks: Mapping[str, Prepared],
    config: Config,
    world: World,
    before_batch: Callable[[], None],
) -> list[dict[str, Any]]:
    """Compute what the config section ``evaluation`` selects: the validation loss, tasks and a completion.

    Every rank must call this.

    Args:
        tasks: the prepared tasks of ``evaluation.tasks``, without ``validation``.
        before_batch: is called on every rank before each batch, and before each token of the completion.

    Returns:
        The results as rows of metrics, without their step. If the weights are not finite, some rows are missing.
    """
    rows: list[dict[str, Any]] = []
    with backend.evaluation_mode():
        if losses := validate(backend, datasets, config, world, before_batch):
            rows.append({**losses, **validate_average(backend, datasets, config, world, before_batch)})
        # Examples and prompts have many shapes, and torch would compile the model again for each shape.
        with torch.compiler.set_stance("force_eager") if config.run.compiles else nullcontext():
            try:
                if tasks:
                    rows.append(_measure_tasks(tasks, backend, config, world, before_batch))
                if config.evaluation.sample:
                    rows.append({SAMPLE_KEY: complete_while_training(backend, config, world, before_batch)})
            except TrainingError as error:  # the step guard decides whether the run continues
                log.warning("evaluation: %s", error)
    return rows


def _measure_tasks(
    tasks: Mapping[str, Prepared],
    backend: Backend,
    config: Config,
    world: World,
    before_batch: Callable[[], None],
) -> dict[str, float]:
    """Measure and log all tasks. Return the results by their keys in ``metrics.jsonl``."""
    scorer = Scorer(backend, config.model, world, config.batch.micro_batch_size * config.seq_len, before_batch)
    row: dict[str, float] = {}
    for name, task in tasks.items():
        result, _ = task.measure(scorer)
        words = [task.name]
        for key, value in result.items():
            if isinstance(value, float):
                row[f"{TASK_PREFIX}{name}_{key}"] = value
                interval = result.get(key + INTERVAL)
                words.append(f"{key} {value:.4f}" + (" [{:.4f}, {:.4f}]".format(*interval) if interval else ""))
        log.info("%s | %s", " | ".join(words), count_of(result["examples"], "example"))
    return row
