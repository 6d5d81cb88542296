"""Writing a checkpoint into a new run folder as a single rank would have saved it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data_tools.storage.atomic import write_json_durably
from data_tools.storage.files import sha256_of_file
from pipeline.checkpoint.layout import MANIFEST_FILE, STATE_FILE, list_checkpoints, read_manifest, tensor_file
from pipeline.checkpoint.pieces import GROUPS, Piece, index_pieces, open_tensors, piece_key
from pipeline.checkpoint.saving import Files, SavedCheckpoint, Shapes, write_new_checkpoint
from pipeline.checkpoint.state import TrainingState, read_state
from pipeline.checkpoint.tensor_stream import StreamedTensor, write_tensors
from pipeline.checkpoint.verification import locate_checkpoint
from pipeline.config.loading import config_from_json, dump_config
from pipeline.config.schema import Config
from pipeline.distributed.world import World
from pipeline.errors import CheckpointError
from pipeline.run_folder.layout import CONFIG_FILE
from pipeline.run_folder.lock import lock_run_folder

_SINGLE_RANK = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"))

TensorGroups = dict[str, dict[str, StreamedTensor]]  # weights or moments -> key -> tensor


@dataclass(frozen=True)
class NewCheckpoint:
    """The contents of a checkpoint to write. Tensors are read when they are written."""

    state: TrainingState
    shapes: Shapes
    groups: TensorGroups
    config: Config  # of the new run
    stored_config: dict[str, Any] | None = None  # in state.json, if it differs from ``config``
    notes: list[str] = field(default_factory=list)  # for the user, about what was translated


@dataclass(frozen=True)
class Conversion:
    """A checkpoint that was written into a new run folder."""

    saved: SavedCheckpoint
    notes: list[str]

    def __str__(self) -> str:
        return "\n".join([str(self.saved), *self.notes])


def convert_checkpoint(source: Path, run_folder: Path) -> Conversion:
    """Rewrite a checkpoint as a single rank would have saved it.

    Training state and config in the checkpoint do not change. The new ``config.json`` names the new run folder.

    Args:
        source: a checkpoint, or a run folder (its newest good one).

    Raises:
        CheckpointError: the source cannot be used, or as for ``write_new_run``.
        ConfigError: the source's config is not valid for this program, or a run is using the folder.
    """
    require_new_run_folder(run_folder)
    folder = locate_checkpoint(source)
    manifest = read_manifest(folder)
    state, stored_config = read_state(folder)
    config = config_from_json(stored_config, origin=str(folder / STATE_FILE))
    config = config.model_copy(update={"run": config.run.model_copy(update={"out_dir": str(run_folder)})})
    pieces, shapes = index_pieces(folder, manifest), manifest["parameters"]
    groups = {
        group: {
            piece_key(kind, name): _stream_pieces(shape, pieces[kind][name])
            for kind in kinds
            for name, shape in shapes.items()
        }
        for group, kinds in GROUPS.items()
    }
    return write_new_run(NewCheckpoint(state, shapes, groups, config, stored_config), run_folder)


def write_new_run(checkpoint: NewCheckpoint, run_folder: Path) -> Conversion:
    """Write a checkpoint and ``config.json`` into a run folder, which is created if it does not exist.

    Raises:
        CheckpointError: the folder has checkpoints, or writing failed. No incomplete checkpoint is left.
        ConfigError: a run is using the folder.
    """
    stored_config = checkpoint.stored_config or dump_config(checkpoint.config)
    with _new_run_folder(run_folder, checkpoint.config):
        saved = write_new_checkpoint(
            run_folder,
            checkpoint.state,
            checkpoint.shapes,
            stored_config,
            _SINGLE_RANK,
            lambda aside: _write_tensor_files(aside, checkpoint.groups),
        )
    return Conversion(saved, checkpoint.notes)


def require_new_run_folder(run_folder: Path) -> None:
    """Raise CheckpointError if a folder cannot hold a new run, because it has checkpoints or is something else."""
    if run_folder.exists() and not run_folder.is_dir() or (run_folder / MANIFEST_FILE).exists():
        raise CheckpointError(f"--out: {run_folder} is not a run folder; name a folder for the new run")
    if existing := list_checkpoints(run_folder):
        raise CheckpointError(f"--out: {run_folder} already has checkpoints ({existing[-1].name}); name another folder")


@contextmanager
def _new_run_folder(run_folder: Path, config: Config) -> Iterator[None]:
    """Create a run folder with ``config.json`` and hold its lock."""
    try:
        run_folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"--out: cannot create {run_folder} ({error.strerror}); name another folder") from None
    with lock_run_folder(run_folder):
        require_new_run_folder(run_folder)
        write_json_durably(run_folder / CONFIG_FILE, dump_config(config))
        yield


def _write_tensor_files(aside: Path, groups: TensorGroups) -> Files:
    files = {}
    for group, tensors in groups.items():
        path = aside / tensor_file(_SINGLE_RANK.rank, group)
        digest = write_tensors(path, dict(sorted(tensors.items())))
        if sha256_of_file(path) != digest:
            raise CheckpointError(f"{path.name}: was not written correctly")
        files[path.name] = {"bytes": path.stat().st_size, "sha256": digest}
    return files


def _stream_pieces(shape: list[int], pieces: list[Piece]) -> StreamedTensor:
    return StreamedTensor(shape, torch.float32, lambda: map(_read_piece, pieces))


def _read_piece(piece: Piece) -> Tensor:
    with open_tensors(piece.file) as file:
        return file.get_tensor(piece.key)
