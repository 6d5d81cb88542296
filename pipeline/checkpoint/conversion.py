"""Copy a checkpoint into a new run folder, as if a single rank had saved it."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data_tools.errors import DataError, one_line_write_errors
from data_tools.storage.atomic import write_json_durably
from data_tools.storage.files import require_writable
from data_tools.storage.new_folders import create_folder, removed_if_unused
from pipeline.checkpoint.layout import GROUPS, STATE_FILE, group_of, list_checkpoints
from pipeline.checkpoint.loading import read_parameter
from pipeline.checkpoint.manifest import read_manifest
from pipeline.checkpoint.pieces import index_pieces, piece_key
from pipeline.checkpoint.retention import delete_checkpoint
from pipeline.checkpoint.saving import SavedCheckpoint, Snapshot, write_checkpoint
from pipeline.checkpoint.state import TrainingState, read_state
from pipeline.checkpoint.tensor_stream import StreamedTensor, TensorGroups
from pipeline.checkpoint.verification import locate_checkpoint, read_located
from pipeline.config.loading import config_from_json, dump_config
from pipeline.config.schema import Config
from pipeline.distributed.world import World
from pipeline.errors import CheckpointError
from pipeline.model.parameter_state import WEIGHT, StateNames, state_names_of
from pipeline.run_folder.layout import CHECKPOINTS_FOLDER, CONFIG_FILE
from pipeline.run_folder.lock import lock_run_folder, why_not_a_run_folder

_SINGLE_RANK = World.alone(torch.device("cpu"))


def convert_checkpoint(source: Path, run_folder: Path) -> SavedCheckpoint:
    """Copy a checkpoint into a new run folder, as if a run with one rank had saved it.

    In the new ``config.json``, ``run.out_dir`` is the new folder.

    Args:
        source: a checkpoint folder, or a run folder. From a run folder, the newest undamaged checkpoint is copied.

    Raises:
        CheckpointError: the source cannot be used, ``run_folder`` already has checkpoints, or writing failed.
        ConfigError: the source's config is not valid, or another process uses ``run_folder``.
    """
    require_new_run_folder(run_folder)
    return read_located(lambda: locate_checkpoint(source), lambda folder: _convert(folder, run_folder))


def _convert(folder: Path, run_folder: Path) -> SavedCheckpoint:
    manifest = read_manifest(folder)
    state, stored_config = read_state(folder)
    config = config_of_new_run(folder, stored_config, run_folder)
    pieces, shapes = index_pieces(folder, manifest), manifest.parameters

    def read(kind: str, name: str) -> Tensor:
        return read_parameter(shapes[name], pieces[kind][name])

    return write_new_run(run_folder, config, state, shapes, read, stored_config, manifest.optimizer_state)


def config_of_new_run(folder: Path, stored_config: dict[str, Any], run_folder: Path) -> Config:
    """Return the config of a checkpoint, with ``run.out_dir`` changed to ``run_folder``.

    Raises ConfigError if the config is not valid. The message names the checkpoint ``folder``.
    """
    config = config_from_json(stored_config, origin=str(folder / STATE_FILE))
    return config.model_copy(update={"run": config.run.model_copy(update={"out_dir": str(run_folder)})})


def write_new_run(
    run_folder: Path,
    config: Config,
    state: TrainingState,
    shapes: dict[str, list[int]],
    read: Callable[[str, str], Tensor],
    stored_config: dict[str, Any] | None = None,
    state_names: StateNames | None = None,
    averaged_steps: tuple[int, ...] = (),
) -> SavedCheckpoint:
    """Write ``config.json`` and a checkpoint into a run folder. Create the folder if it does not exist.

    Args:
        shapes: the shapes of all parameters, by canonical name.
        read: takes (kind, canonical name), and returns the tensor to write. The kind is ``weight`` or the name of an
            optimizer tensor, such as ``exp_avg``.
        stored_config: the config to store in the checkpoint. If None, ``config`` is stored.
        state_names: the names of each parameter's optimizer tensors. If None, ``config.optimizer`` decides.
        averaged_steps: if the weights are an average, the steps of the averaged checkpoints.

    Raises:
        CheckpointError: the folder already has checkpoints, or the checkpoint cannot be written.
        DataError: ``config.json`` cannot be written.
        ConfigError: another process uses the run folder.
    """
    state_names = state_names or state_names_of(shapes, config)
    groups: TensorGroups = {group: {} for group in GROUPS}
    for name, shape in shapes.items():
        for kind in (WEIGHT, *state_names[name]):
            tensor = StreamedTensor(shape, torch.float32, partial(read, kind, name))
            groups[group_of(kind)][piece_key(kind, name)] = tensor
    try:
        created = create_folder(run_folder / CHECKPOINTS_FOLDER)
    except OSError as error:
        raise CheckpointError(f"--out: cannot create {run_folder} ({error.strerror}); name another folder") from None
    content = dump_config(config)
    with removed_if_unused(created), lock_run_folder(run_folder):
        require_new_run_folder(run_folder)
        snapshot = Snapshot(state, shapes, state_names, groups, averaged_steps)
        saved = write_checkpoint(run_folder, snapshot, stored_config or content, _SINGLE_RANK, keep_last=1)
        try:
            with one_line_write_errors(run_folder / CONFIG_FILE):
                write_json_durably(run_folder / CONFIG_FILE, content)
        except DataError:
            delete_checkpoint(saved.folder)  # otherwise, the command could not be repeated
            raise
        return saved


def require_new_run_folder(run_folder: Path) -> None:
    """Raise an error if a new run cannot be written to a path.

    Raises:
        CheckpointError: the path is a checkpoint or a file, has checkpoints, or contains other things than a run.
        DataError: the path is not writable.
    """
    if run_folder.exists() and not run_folder.is_dir():
        raise CheckpointError(f"--out: {run_folder} is not a run folder; name a folder for the new run")
    if reason := why_not_a_run_folder(run_folder):
        raise CheckpointError(f"--out: {reason}; name a folder for the new run alone")
    if existing := list_checkpoints(run_folder):
        raise CheckpointError(f"--out: {run_folder} already has checkpoints ({existing[-1].name}); name another folder")
    require_writable(run_folder, "--out")
