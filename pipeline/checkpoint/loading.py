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
from pipeline.checkpoint.pieces import EXP_AVG, EXP_AVG_SQ, WEIGHT, parse_label
from pipeline.errors import CheckpointError


@dataclass(frozen=True)
class _Piece:
    """A stored run of elements: ``key`` in ``file``."""

    file: Path
    key: str
    start: int
    stop: int


def load_training_state(folder: Path, backend: Backend) -> TrainingState:
    """Fill the backend's local state from a verified checkpoint, piece by overlapping piece.

    Raises:
        CheckpointError: it belongs to another model, or does not cover it.
    """
    state, _ = read_state(folder)
    shapes = {name: list(shape) for name, shape in backend.parameter_shapes.items()}
    _expect_same_model(folder, shapes)
    fragments = backend.fragments()
    for kind in (WEIGHT, EXP_AVG, EXP_AVG_SQ):
        pieces = _index_pieces(folder, kind, shapes)
        for fragment in fragments:
            _fill(getattr(fragment, kind), fragment.start, pieces[fragment.name], fragment.name)
    backend.state_was_loaded(state.updates)
    backend.loss_scaler.scale = state.loss_scale if backend.loss_scaler.dynamic else 1.0
    backend.loss_scaler.good_steps = state.loss_scale_good_steps
    return state


def load_weights(folder: Path, parameters: dict[str, Tensor]) -> None:
    """Fill whole parameters by canonical name, weights only, in place.

    Raises:
        CheckpointError: it belongs to another model, or does not cover it.
    """
    shapes = {name: list(parameter.shape) for name, parameter in parameters.items()}
    _expect_same_model(folder, shapes)
    pieces = _index_pieces(folder, WEIGHT, shapes)
    with torch.no_grad():
        for name, parameter in parameters.items():
            _fill(parameter.view(-1), 0, pieces[name], name)


def _expect_same_model(folder: Path, shapes: dict[str, list[int]]) -> None:
    stored = read_manifest(folder)["parameters"]
    for name in [*shapes, *stored]:
        if shapes.get(name) != stored.get(name):
            raise CheckpointError(
                f"{folder}: belongs to another model: {name} has shape {stored.get(name, 'none')} there "
                f"and {shapes.get(name, 'none')} here; use the run's own config, or another run.out_dir"
            )


def _index_pieces(folder: Path, kind: str, shapes: dict[str, list[int]]) -> dict[str, list[_Piece]]:
    """Stored pieces of each parameter, by reading the headers only."""
    pieces: dict[str, list[_Piece]] = {name: [] for name in shapes}
    which, prefix = ("weights", "") if kind == WEIGHT else ("moments", f"{kind}/")
    for name in read_manifest(folder)["files"]:
        if not name.endswith(f"_{which}.safetensors"):
            continue
        with safe_open(folder / name, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 - safe_open is no mapping
                if key.startswith(prefix):
                    parameter, piece = _parse_piece(folder / name, key, key.removeprefix(prefix), shapes)
                    pieces[parameter].append(piece)
    return pieces


def _parse_piece(file: Path, key: str, label: str, shapes: dict[str, list[int]]) -> tuple[str, _Piece]:
    name, run = parse_label(label)
    if name not in shapes:
        raise CheckpointError(f"{file}: holds {key!r}, which the model does not have")
    start, stop = run or (0, torch.Size(shapes[name]).numel())
    return name, _Piece(file, key, start, stop)


def _fill(target: Tensor, start: int, pieces: list[_Piece], name: str) -> None:
    """Copy into ``target``, elements ``start`` on of a flattened parameter, what the pieces hold of them."""
    missing = target.numel()
    for piece in pieces:
        low, high = max(piece.start, start), min(piece.stop, start + target.numel())
        if low >= high:
            continue
        with safe_open(piece.file, framework="pt") as file:
            target[low - start : high - start].copy_(_read_elements(file, piece, low, high))
        missing -= high - low
    if missing:
        raise CheckpointError(
            f"{pieces[0].file.parent if pieces else 'the checkpoint'}: {missing} elements of {name} are missing"
        )


def _read_elements(file: Any, piece: _Piece, low: int, high: int) -> Tensor:
    """Elements low to high of a flattened parameter, reading only the rows that hold them."""
    stored = file.get_slice(piece.key)
    shape = stored.get_shape()
    row = torch.Size(shape[1:]).numel()
    low, high = low - piece.start, high - piece.start
    first, last = low // row, -(-high // row)
    elements: Tensor = stored[first:last].reshape(-1)
    if elements.dtype != torch.float32:
        raise CheckpointError(f"{piece.file}: {piece.key} is {elements.dtype}, expected float32")
    return elements[low - first * row : high - first * row]
