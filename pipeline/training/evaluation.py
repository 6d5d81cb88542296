"""Evaluate the model that is being trained."""

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch

from pipeline.backends import Backend
from pipeline.config.schema import Config
from pipeline.data.datasets import TokenDataset
from pipeline.distributed.world import World
from pipeline.errors import TrainingError
from pipeline.evaluation.run import measure_tasks
from pipeline.evaluation.tasks import Prepared
from pipeline.evaluation.validation import validate, validate_average
from pipeline.generation.text_generator import complete_while_training
from pipeline.run_folder.metrics import SAMPLE_KEY

log = logging.getLogger(__name__)


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
                    rows.append(measure_tasks(tasks, backend, config, world, before_batch))
                if config.evaluation.sample:
                    rows.append({SAMPLE_KEY: complete_while_training(backend, config, world, before_batch)})
            except TrainingError as error:  # the step guard decides whether the run continues
                log.warning("evaluation: %s", error)
    return rows
