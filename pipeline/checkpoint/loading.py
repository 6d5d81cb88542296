"""Loading: each rank copies the overlap of stored pieces and its own, reading nothing else."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from pipeline.backends import Backend
from pipeline.checkpoint.folder import TrainingState, read_manifest, read_state
from pipeline.checkpoint.pieces import KINDS, WEIGHT, Piece, PieceIndex, index_pieces
from pipeline.checkpoint.verification import locate_checkpoint
from pipeline.config.loading import config_from_json
from pipeline.config.schema import Config
from pipeline.errors import CheckpointError
from pipeline.model.gpt2 import GPT2, allocate_model
from pipeline.run_folder.layout import run_folder_of


def load_training_state(folder: Path, backend: Backend) -> TrainingState:
    """Fill the backend's local state from a checkpoint, piece by overlapping piece.

    Raises:
        CheckpointError: it belongs to another model, or its tensors are not what they should be; the
            backend is as it was then.
    """
    state, _ = read_state(folder)
    index = _index_of_model(folder, {name: list(shape) for name, shape in backend.parameter_shapes.items()})
    for kind in KINDS:
        for fragment in backend.fragments():
            _fill(getattr(fragment, kind), fragment.start, index[kind][fragment.name])
    backend.state_was_loaded(state.updates)
    backend.loss_scaler.restore(state.loss_scale, state.loss_scale_good_steps)
    return state


def load_weights(folder: Path, parameters: dict[str, Tensor]) -> None:
    """Fill whole parameters by canonical name, weights only, in place.

    Raises:
        CheckpointError: it belongs to another model, or its tensors are not what they should be.
    """
    index = _index_of_model(folder, {name: list(parameter.shape) for name, parameter in parameters.items()})
    with torch.no_grad():
        for name, parameter in parameters.items():
            _fill(parameter.view(-1), 0, index[WEIGHT][name])


def read_parameter(shape: list[int], pieces: list[Piece]) -> Tensor:
    """One whole parameter in fp32, put together from its pieces."""
    parameter = torch.empty(shape)
    _fill(parameter.view(-1), 0, pieces)
    return parameter


def _index_of_model(folder: Path, shapes: dict[str, list[int]]) -> PieceIndex:
    manifest = read_manifest(folder)
    stored = manifest["parameters"]
    for name in [*shapes, *stored]:
        if shapes.get(name) != stored.get(name):
            raise CheckpointError(
                f"{folder}: belongs to another model: {name} has shape {stored.get(name, 'none')} there "
                f"and {shapes.get(name, 'none')} here; use the run's own config, or another run.out_dir"
            )
    return index_pieces(folder, manifest)


def _fill(target: Tensor, start: int, pieces: list[Piece]) -> None:
    """Copy into ``target``, elements ``start`` on of a flattened parameter, what the pieces hold of them."""
    for piece in pieces:
        low, high = max(piece.start, start), min(piece.stop, start + target.numel())
        if low < high:
            with safe_open(piece.file, framework="pt") as file:
                target[low - start : high - start].copy_(_read_elements(file, piece, low, high))


def _read_elements(file: Any, piece: Piece, low: int, high: int) -> Tensor:
    """Elements low to high of a flattened parameter, reading only the rows that hold them."""
    stored = file.get_slice(piece.key)
    row = torch.Size(stored.get_shape()[1:]).numel()
    low, high = low - piece.start, high - piece.start
    first, last = low // row, -(-high // row)
    elements: Tensor = stored[first:last].reshape(-1)
    return elements[low - first * row : high - first * row]


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
        return run_folder_of(self.checkpoint)


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
