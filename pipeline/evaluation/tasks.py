"""The registry of tasks, and the run of some of them over one checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.tensorboard import SummaryWriter

from data_tools.errors import DataError
from data_tools.shards import VAL_SPLIT, load_manifest, open_split
from data_tools.storage import write_json_durably
from pipeline.checkpoint import CHECKPOINTS_FOLDER, load_weights, locate_checkpoint, read_state
from pipeline.config import Config
from pipeline.config_files import config_from_json
from pipeline.distributed import World
from pipeline.errors import ConfigError
from pipeline.evaluation.results import EVALUATION_FOLDER, Results
from pipeline.evaluation.validation import evaluate_validation
from pipeline.metrics import TENSORBOARD_FOLDER, perplexity
from pipeline.model import GPT2, allocate_model
from pipeline.training_data import expect_same_vocabulary


@dataclass(frozen=True)
class LoadedModel:
    """A model read from a checkpoint, ready to score, on every rank."""

    model: GPT2
    config: Config  # of the run that trained it
    checkpoint: Path
    step: int

    @property
    def run_folder(self) -> Path:
        """Where results go: the run that holds the checkpoint, or the checkpoint itself when it was moved."""
        parent = self.checkpoint.parent
        return parent.parent if parent.name == CHECKPOINTS_FOLDER else self.checkpoint


@dataclass(frozen=True)
class EvaluationOptions:
    """What a person may change about an evaluation. None: as the run was trained."""

    data_path: str | None = None
    batch_size: int | None = None
    precision: str | None = None


def load_model(path: Path, device: torch.device) -> LoadedModel:
    """The fp32 model of a checkpoint folder, or of the newest good checkpoint of a run folder.

    Raises:
        CheckpointError: there is none, it is damaged, or its config is not one of this program.
    """
    folder = locate_checkpoint(path)
    state, stored = read_state(folder)
    config = config_from_json(stored, origin=str(folder / "state.json"))
    model = allocate_model(config.model, device)
    load_weights(folder, {name: parameter.detach() for name, parameter in model.named_parameters()})
    model.assert_tied()
    return LoadedModel(model.eval(), config, folder, state.step)


def _validation(loaded: LoadedModel, options: EvaluationOptions, world: World) -> dict[str, Any]:
    data = loaded.config.data
    if options.data_path or data.mixture is None:
        return _validation_on(options.data_path or data.parts[0].path, loaded, options, world)
    # As while training: parts without a validation split are left out.
    parts = [part for part in data.mixture if load_manifest(part.path).tokens_of(VAL_SPLIT)]
    if not parts:
        raise DataError("data.mixture: no part has a validation split; name a data set that has one with --data")
    results = {part.name: _validation_on(part.path, loaded, options, world) for part in parts}
    loss = sum(part.weight * results[part.name]["loss"] for part in parts) / sum(part.weight for part in parts)
    losses = {f"{name}_loss": result["loss"] for name, result in results.items()}
    return {"data": "data.mixture", "loss": loss, "perplexity": perplexity(loss), **losses, "parts": results}


def _validation_on(path: str, loaded: LoadedModel, options: EvaluationOptions, world: World) -> dict[str, Any]:
    config = loaded.config
    stream = open_split(path, VAL_SPLIT)
    expect_same_vocabulary(stream, config.model, path)
    results = evaluate_validation(
        loaded.model,
        stream,
        config.seq_len,
        options.batch_size or config.batch.micro_batch_size,
        options.precision or config.run.precision,
        world,
    )
    return {"data": path, "data_sha256": stream.manifest.content_sha256(), **results}


#: Name on the command line -> the task. A task returns JSON values, the same on every rank.
TASKS: dict[str, Callable[[LoadedModel, EvaluationOptions, World], dict[str, Any]]] = {"validation": _validation}


def run_tasks(checkpoint: Path, tasks: Sequence[str], options: EvaluationOptions, world: World) -> tuple[Results, Path]:
    """Score a checkpoint on some tasks; the main rank writes JSON and TensorBoard.

    Returns:
        The results by task, and the folder of the JSON files.

    Raises:
        ConfigError: a task that does not exist.
        CheckpointError, DataError: what is to be scored, or scored on, cannot be used.
    """
    for task in tasks:
        if task not in TASKS:
            raise ConfigError(f"--tasks {task}: no such task; there are: {', '.join(TASKS)}")
    loaded = load_model(checkpoint, world.device)
    results: Results = {}
    for task in tasks:
        head = {"task": task, "checkpoint": str(loaded.checkpoint), "step": loaded.step}
        results[task] = {**head, **TASKS[task](loaded, options, world)}
    folder = loaded.run_folder / EVALUATION_FOLDER
    if world.is_main:
        _write_results(results, loaded, folder)
    return results, folder


def _write_results(results: Results, loaded: LoadedModel, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with SummaryWriter(str(loaded.run_folder / TENSORBOARD_FOLDER)) as writer:
        for task, result in results.items():
            write_json_durably(folder / f"{task}.json", result)
            for key, value in result.items():
                if isinstance(value, float):
                    writer.add_scalar(f"evaluation/{task}_{key}", value, loaded.step)
