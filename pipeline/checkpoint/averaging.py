"""Average the weights of several checkpoints of a run."""

import logging
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from pipeline.checkpoint.conversion import config_of_new_run, require_new_run_folder, write_new_run
from pipeline.checkpoint.layout import (
    checkpoint_of_step,
    is_checkpoint,
    list_checkpoints,
    no_checkpoint_error,
    step_of,
)
from pipeline.checkpoint.loading import read_parameter
from pipeline.checkpoint.manifest import CheckpointManifest, read_manifest
from pipeline.checkpoint.pieces import PieceIndex, index_pieces
from pipeline.checkpoint.saving import SavedCheckpoint
from pipeline.checkpoint.state import read_state
from pipeline.checkpoint.verification import describe_deletion, find_damage, folder_was_deleted
from pipeline.errors import CheckpointError
from pipeline.model.parameter_state import EMA, WEIGHT

log = logging.getLogger(__name__)


def average_checkpoints(
    run: Path, run_folder: Path, *, last: int | None = None, steps: Sequence[int] | None = None
) -> SavedCheckpoint:
    """Average the weights of several checkpoints of ``run``, and write a new run into ``run_folder``.

    If all checkpoints have a moving average of the weights (``averaging.ema``), these averages are averaged too. All
    other values come from the newest averaged checkpoint.

    Args:
        last: the number of newest checkpoints to average, at least 2. Give either ``last`` or ``steps``.
        steps: the steps of the checkpoints to average.

    Raises:
        CheckpointError: a checkpoint is missing or damaged, the checkpoints belong to different models, or the new run
            cannot be written.
        ConfigError: the newest checkpoint's config is not valid, or another process uses ``run_folder``.
    """
    require_new_run_folder(run_folder)
    folders = _choose_checkpoints(run, last, steps)
    try:
        return _average(folders, run_folder)
    except CheckpointError:
        if deleted := [folder for folder in folders if folder_was_deleted(folder)]:
            raise CheckpointError(
                f"{describe_deletion(deleted[0])}; repeat the command with --last, or with --steps of checkpoints that "
                "the run keeps"
            ) from None
        raise


def _average(folders: Sequence[Path], run_folder: Path) -> SavedCheckpoint:
    for folder in folders:
        if problem := find_damage(folder):
            raise CheckpointError(f"{problem}; leave this checkpoint out: name the other ones with --steps")
    manifests = [read_manifest(folder) for folder in folders]
    _require_same_parameters(folders, manifests)
    indices = [index_pieces(folder, manifest) for folder, manifest in zip(folders, manifests, strict=True)]
    state, stored_config = read_state(folders[-1])
    shapes = manifests[-1].parameters
    return write_new_run(
        run_folder,
        config_of_new_run(folders[-1], stored_config, run_folder),
        replace(state, evaluation_is_due=False),
        shapes,
        partial(_read_mean, shapes, indices),
        stored_config,
        _choose_state_names(manifests),
        averaged_steps=tuple(map(step_of, folders)),
    )


def _choose_checkpoints(run: Path, last: int | None, steps: Sequence[int] | None) -> list[Path]:
    """Return the chosen checkpoints, oldest first."""
    if is_checkpoint(run):
        raise CheckpointError(f"{run}: is a checkpoint; give the run folder that holds it")
    if steps is not None:
        chosen = sorted(set(steps))
        if len(chosen) < 2:
            raise CheckpointError(f"--steps: a mean needs at least two checkpoints, {len(chosen)} is named")
        return [checkpoint_of_step(run, step) for step in chosen]
    assert last is not None
    if last < 2:
        raise CheckpointError(f"--last: a mean needs at least two checkpoints, {last} is asked for")
    folders = list_checkpoints(run)
    if not folders:
        raise no_checkpoint_error(run)
    if len(folders) < last:
        existing = ", ".join(str(step_of(folder)) for folder in folders)
        raise CheckpointError(
            f"{run}: has fewer than {last} checkpoints (those of steps {existing}); give a smaller --last, or raise "
            "checkpoint.keep_last in the next run"
        )
    return folders[-last:]


def _require_same_parameters(folders: Sequence[Path], manifests: Sequence[CheckpointManifest]) -> None:
    newest = manifests[-1].parameters
    for folder, manifest in zip(folders, manifests, strict=True):
        for name in {**newest, **manifest.parameters}:
            here, there = (parameters.get(name, "none") for parameters in (manifest.parameters, newest))
            if here != there:
                raise CheckpointError(
                    f"{folder}: {name} has shape {here}, and {there} in {folders[-1].name}; average checkpoints of one "
                    "model"
                )


def _choose_state_names(manifests: Sequence[CheckpointManifest]) -> dict[str, list[str]]:
    """Return the names of the optimizer tensors to write. They include ``ema`` only if all checkpoints have it."""
    names = manifests[-1].optimizer_state
    have_average = [all(EMA in kinds for kinds in manifest.optimizer_state.values()) for manifest in manifests]
    if any(have_average) and not all(have_average):
        log.info("some of the checkpoints have no moving average of the weights, so the new run has none")
        return {name: [kind for kind in kinds if kind != EMA] for name, kinds in names.items()}
    return names


def _read_mean(shapes: dict[str, list[int]], indices: Sequence[PieceIndex], kind: str, name: str) -> Tensor:
    """Return a tensor of the new checkpoint.

    For a weight or a moving average, this is the mean over all checkpoints, summed in fp64. For other tensors of
    the optimizer, this is the newest checkpoint's tensor.
    """
    if kind not in (WEIGHT, EMA):
        return read_parameter(shapes[name], indices[-1][kind][name])
    total = torch.zeros(shapes[name], dtype=torch.float64)
    for index in indices:
        total += read_parameter(shapes[name], index[kind][name])
    return total / len(indices)
