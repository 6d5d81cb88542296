"""Score a checkpoint on evaluation tasks."""

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from pipeline.checkpoint.inspection import find_different_numbers
from pipeline.checkpoint.loading import LoadedModel, load_model_of_main
from pipeline.config.paths import find_path
from pipeline.distributed.cpu import configure_cpu
from pipeline.distributed.world import World
from pipeline.evaluation.examples import Settings
from pipeline.evaluation.output import choose_output
from pipeline.evaluation.protocols import Figures
from pipeline.evaluation.results import VALIDATION, Results
from pipeline.evaluation.scoring import Scorer, compute_for_scoring
from pipeline.evaluation.tasks import Prepared, check_tasks, prepare_task
from pipeline.evaluation.validation_task import PreparedMixture, PreparedSplit, prepare_validation
from pipeline.hardware.matmul_ceiling import describe_slow_precision
from pipeline.run_folder.metrics import DIFFERENT_NUMBERS_KEY

log = logging.getLogger(__name__)


def run_tasks(
    checkpoint: Path | str,
    tasks: Sequence[str],
    settings: Settings,
    world: World,
    *,
    paths: Mapping[str, str] | None = None,
    batch_size: int | None = None,
    precision: str | None = None,
    weights: str = "training",
    examples_file: Path | None = None,
    out: Path | None = None,
    show: Callable[[Results], None] = lambda results: None,
) -> tuple[Results, list[Path]]:
    """Score a checkpoint on the given tasks. The main rank shows the results and writes them to files.

    Without ``out``, the results go to the run folder: to JSON files in ``evaluation/`` and to the TensorBoard events.
    If the run folder is not writable or is a URL, the results are only shown.

    Every rank must call this function.

    Args:
        checkpoint: a checkpoint folder or a run folder, or its URL.
        paths: task name -> path of the task's data. For other tasks, the path in the run's ``evaluation.data`` is used.
        batch_size: sequences per forward pass and rank. None means the run's micro-batch size.
        precision: the precision of the forward passes. None means the value of ``run.precision`` in the run's config.
        weights: ``training``, or ``ema`` for the moving average of the weights. With ``ema``, the names of the results
            end with ``_ema``.
        examples_file: a JSONL file for the scores of each example.
        out: the folder for the JSON files. None means the run folder.
        show: is called with the results before they are written.

    Returns:
        The results by name, and the files that this rank has written.

    Raises:
        ConfigError: a task does not exist, or does not support a setting.
        CheckpointError: the checkpoint cannot be used.
        DataError: the data of a task cannot be used.
    """
    paths = paths or {}
    if world.device.type == "cpu":
        configure_cpu(world)
    loaded = load_model_of_main(checkpoint, world, weights)
    config = loaded.config
    output = choose_output(checkpoint, loaded.run_folder, tasks, out, examples_file)
    check_tasks(tasks, settings, paths, config.evaluation.data)
    # Prepare all tasks first, so that errors in the data appear before hours of scoring.
    prepared = _prepare(loaded, tasks, settings, paths, world)
    precision = precision or config.run.precision
    scorer = _create_scorer(loaded, precision, batch_size or config.batch.micro_batch_size, world)
    facts = _facts_of(loaded, precision, weights)
    results: Results = {}
    examples: list[Figures] = []
    for name, task in prepared.items():
        world.progress.reach(f"task {name}")
        figures, scores = task.measure(scorer)
        key = task.name if weights == "training" else f"{task.name}_{weights}"
        results[key] = {"task": name, **facts, **figures}
        examples += scores
    world.progress.reach("writing the results", is_patient=True, repeats=False)
    if not world.is_main:
        return results, []
    if keys := find_different_numbers(loaded.run_folder, loaded.step, config):
        results = {name: {**result, DIFFERENT_NUMBERS_KEY: keys} for name, result in results.items()}
    show(results)
    return results, output.write(results, examples, loaded.step)


def _prepare(
    loaded: LoadedModel, tasks: Sequence[str], settings: Settings, given: Mapping[str, str], world: World
) -> dict[str, Prepared | PreparedSplit | PreparedMixture]:
    """Open the data of each task: the path in ``given``, or else the path in the run's ``evaluation.data``."""
    config, paths = loaded.config, dict(given)
    for task, path in config.evaluation.data.items():
        if task in tasks and task not in given:
            paths[task] = find_path(path, config.run)
    return {
        task: world.call_on_each(partial(prepare_validation, loaded, paths.get(task)))
        if task == VALIDATION
        else prepare_task(task, paths.get(task), settings, config.model, world, loaded.tokenizer)
        for task in tasks
    }


def _create_scorer(loaded: LoadedModel, precision: str, batch_size: int, world: World) -> Scorer:
    """Return a scorer for the model. If fp32 is faster on this CPU, the main rank logs a warning."""
    if world.is_main and (warning := describe_slow_precision(precision, world.device, "--precision ")):
        log.warning(warning)
    compute = compute_for_scoring(loaded.model, precision, world.device)
    return Scorer(compute, loaded.config.model, world, batch_size * loaded.config.seq_len)


def _facts_of(loaded: LoadedModel, precision: str, weights: str) -> dict[str, Any]:
    """Return the facts in the result of each task: which weights were measured, and how."""
    return {
        "checkpoint": str(loaded.checkpoint),
        "step": loaded.step,
        "weights_sha256": loaded.weights_sha256,
        **({} if weights == "training" else {"weights": weights}),
        "precision": precision,
    }
