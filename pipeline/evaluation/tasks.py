"""The run of some tasks over one checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from data_tools.errors import DataError
from data_tools.shards import VAL_SPLIT, load_manifest, open_split
from data_tools.storage.atomic import write_json_durably
from pipeline.checkpoint.loading import LoadedModel, load_model
from pipeline.data.datasets import check_same_vocabulary
from pipeline.distributed.cpu import configure_cpu
from pipeline.distributed.device import matmul_dtype
from pipeline.distributed.world import World
from pipeline.evaluation.preparation import expect_known_tasks, prepare_task
from pipeline.evaluation.prepared import PreparedTask, Settings
from pipeline.evaluation.results import VALIDATION, Results
from pipeline.evaluation.scoring import Scorer
from pipeline.evaluation.validation import evaluate_validation, mixture_loss
from pipeline.model.packed_linear import pack_linear_layers
from pipeline.model.precision import replicated_compute
from pipeline.run_folder.layout import EVALUATION_FOLDER, TENSORBOARD_FOLDER
from pipeline.run_folder.metrics import perplexity


@dataclass(frozen=True)
class EvaluationOptions:
    """What a person may change about an evaluation. None: as the run was trained."""

    data: Mapping[str, str] = field(default_factory=dict)  # task -> path; over ``evaluation.data`` of the run
    batch_size: int | None = None
    precision: str | None = None
    settings: Settings = Settings()


def run_tasks(checkpoint: Path, tasks: Sequence[str], options: EvaluationOptions, world: World) -> tuple[Results, Path]:
    """Score a checkpoint on some tasks; the main rank writes JSON and TensorBoard.

    Returns:
        The results by task, and the folder of the JSON files.

    Raises:
        ConfigError: a task that does not exist, or an option that it does not have.
        CheckpointError, DataError: what is to be scored, or scored on, cannot be used.
    """
    if world.device.type == "cpu":
        configure_cpu(world)
    loaded = load_model(checkpoint, world.device)
    options = replace(options, data={**loaded.config.evaluation.data, **options.data})
    expect_known_tasks(tasks, options.data)
    # Data first: what cannot be read is known before hours of scoring.
    prepared = {
        task: prepare_task(task, options.data.get(task), options.settings, loaded.config.model, world)
        for task in tasks
        if task != VALIDATION
    }
    pack_linear_layers(loaded.model, matmul_dtype(options.precision or loaded.config.run.precision))
    results: Results = {}
    for task in tasks:
        head = {"task": task, "checkpoint": str(loaded.checkpoint), "step": loaded.step}
        if task == VALIDATION:
            results[task] = {**head, **_validation(loaded, options, world)}
        else:
            results[prepared[task].name] = {**head, **_measured(prepared[task], loaded, options, world)}
    folder = loaded.run_folder / EVALUATION_FOLDER
    if world.is_main:
        _write_results(results, loaded, folder)
    return results, folder


def _measured(task: PreparedTask, loaded: LoadedModel, options: EvaluationOptions, world: World) -> dict[str, Any]:
    config = loaded.config
    precision = options.precision or config.run.precision
    compute = replicated_compute(loaded.model, precision, world.device).eval()
    batch_tokens = (options.batch_size or config.batch.micro_batch_size) * config.seq_len
    return {"precision": precision, **task.measure(Scorer(compute, config.model, world, batch_tokens))}


def _validation(loaded: LoadedModel, options: EvaluationOptions, world: World) -> dict[str, Any]:
    data = loaded.config.data
    if VALIDATION in options.data or data.mixture is None:
        return _validation_on(options.data.get(VALIDATION, data.components[0].path), loaded, options, world)
    # As while training: parts without a validation split are left out.
    parts = [part for part in data.mixture if load_manifest(part.path).tokens_of(VAL_SPLIT)]
    if not parts:
        raise DataError(
            "data.mixture: no part has a validation split; name a data set that has one with --data validation=DIR"
        )
    results = {part.name: _validation_on(part.path, loaded, options, world) for part in parts}
    losses = {name: result["loss"] for name, result in results.items()}
    loss = mixture_loss(losses, parts)
    by_name = {f"{name}_loss": value for name, value in losses.items()}
    return {"data": "data.mixture", "loss": loss, "perplexity": perplexity(loss), **by_name, "parts": results}


def _validation_on(path: str, loaded: LoadedModel, options: EvaluationOptions, world: World) -> dict[str, Any]:
    config = loaded.config
    stream = open_split(path, VAL_SPLIT)
    check_same_vocabulary(stream, config.model, path)
    results = evaluate_validation(
        loaded.model,
        stream,
        config.seq_len,
        options.batch_size or config.batch.micro_batch_size,
        options.precision or config.run.precision,
        world,
    )
    return {"data": path, "data_sha256": stream.manifest.content_sha256(), **results}


def _write_results(results: Results, loaded: LoadedModel, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with SummaryWriter(str(loaded.run_folder / TENSORBOARD_FOLDER)) as writer:
        for task, result in results.items():
            write_json_durably(folder / f"{task}.json", result)
            for key, value in result.items():
                if isinstance(value, float):
                    writer.add_scalar(f"evaluation/{task}_{key}", value, loaded.step)
