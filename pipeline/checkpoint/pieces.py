"""Define how safetensors files store parameters in pieces, and find the pieces.

A piece is a whole parameter, or a range of its flattened elements:

    whole parameter   key ``name``               original shape
    range             key ``name[start:stop]``   shape (stop - start,)

``name`` is the name in ``GPT2.named_parameters()``. Keys of optimizer tensors begin with a prefix such as ``exp_avg/``.
"""

import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from data_tools.storage.content import describe_content
from pipeline.checkpoint.layout import MOMENTS, group_of, parse_tensor_file
from pipeline.checkpoint.manifest import CheckpointManifest
from pipeline.errors import CheckpointError
from pipeline.model.parameter_state import KINDS_OF_WEIGHTS, WEIGHT

_RANGE_KEY = re.compile(r"(?P<name>.+)\[(?P<start>\d+):(?P<stop>\d+)\]")
_DTYPE = "F32"  # the name in safetensors


@dataclass(frozen=True)
class Piece:
    """Elements ``start`` to ``stop - 1`` of a flattened parameter, stored in a tensor file."""

    file: Path
    key: str
    start: int
    stop: int


#: kind -> parameter -> pieces, sorted by their first element. A kind is ``weight`` or the name of an optimizer tensor.
#: An optimizer tensor need not exist for every parameter.
PieceIndex = dict[str, dict[str, list[Piece]]]


def piece_key(kind: str, name: str, elements: tuple[int, int] | None = None) -> str:
    """Return the key under which a safetensors file stores a piece of a parameter.

    Args:
        kind: ``weight``, or the name of an optimizer tensor, such as ``exp_avg``.
        elements: the range (start, stop) of the flattened parameter, or None for the whole parameter.
    """
    label = name if elements is None else f"{name}[{elements[0]}:{elements[1]}]"
    return label if kind == WEIGHT else f"{kind}/{label}"


def manifest_of_weights(manifest: CheckpointManifest, weights: str) -> CheckpointManifest:
    """Return a manifest without the files that a reader of the weights does not need.

    Args:
        weights: ``training`` for the trained weights. For ``ema``, their moving average, the manifest does not change,
            because the optimizer's files contain the average.
    """
    if group_of(KINDS_OF_WEIGHTS[weights]) == MOMENTS:
        return manifest
    moments = {name for name in manifest.files if (found := parse_tensor_file(name)) and found[1] == MOMENTS}
    return replace(
        manifest,
        optimizer_state={name: [] for name in manifest.optimizer_state},
        files={name: entry for name, entry in manifest.files.items() if name not in moments},
    )


@contextmanager
def open_tensors(path: Path) -> Iterator[Any]:
    """Return a context manager that memory-maps a safetensors file. Raises CheckpointError if this fails."""
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: {describe_content(path) or f'cannot be read ({error})'}") from None


def index_pieces(folder: Path, manifest: CheckpointManifest, files: Collection[str] | None = None) -> PieceIndex:
    """Return the index of the pieces (stored ranges of parameters) in a checkpoint.

    Only the headers of the tensor files are read.

    Args:
        files: the names of the tensor files to read. If None, all files are read, and this function checks that every
            element is stored exactly once.

    Raises:
        CheckpointError: a tensor file is damaged, does not match the manifest, or is not fp32.
    """
    shapes = {name: torch.Size(shape) for name, shape in manifest.parameters.items()}
    index: PieceIndex = {WEIGHT: {name: [] for name in shapes}}
    for name, kinds in manifest.optimizer_state.items():
        for kind in kinds:
            index.setdefault(kind, {})[name] = []
    for file in manifest.files if files is None else files:
        if rank_and_group := parse_tensor_file(file):
            for kind, name, piece in _read_pieces(folder / file, rank_and_group[1], shapes, index):
                index[kind][name].append(piece)
    for kind, by_name in index.items():
        for name, pieces in by_name.items():
            pieces.sort(key=lambda piece: piece.start)
            if files is None:
                _require_complete(folder, f"{kind} of {name}", pieces, shapes[name].numel())
    return index


def _read_pieces(
    path: Path, group: str, shapes: dict[str, torch.Size], index: PieceIndex
) -> Iterator[tuple[str, str, Piece]]:
    """Yield (kind, parameter name, piece) for each tensor of a file. The keys of ``index`` are the valid kinds."""
    with open_tensors(path) as file:
        for key in file.keys():  # noqa: SIM118 - safe_open is not a mapping
            stored = file.get_slice(key)
            shape, dtype = stored.get_shape(), stored.get_dtype()
            try:
                kind, name, elements = _parse_key(key, group, index)
            except ValueError as error:
                raise CheckpointError(f"{path}: {error}") from None
            if name not in index[kind]:
                raise CheckpointError(f"{path}: holds {key!r}, which the manifest does not name")
            if dtype != _DTYPE:
                raise CheckpointError(f"{path}: {key} is {dtype}, expected {_DTYPE}")
            whole = shapes[name]
            start, stop = elements or (0, whole.numel())
            expected = [stop - start] if elements else list(whole)
            if not start < stop <= whole.numel() or shape != expected:
                raise CheckpointError(f"{path}: {key} has shape {shape}, expected {expected} within {list(whole)}")
            yield kind, name, Piece(path, key, start, stop)


def _parse_key(key: str, group: str, index: PieceIndex) -> tuple[str, str, tuple[int, int] | None]:
    """Return (kind, parameter name, range) for a key. Raise ValueError if the key of a moment has no known prefix."""
    kind, label = WEIGHT, key
    if group == MOMENTS:
        kind, _, label = key.partition("/")
        if kind == WEIGHT or kind not in index:
            raise ValueError(f"{key!r} is not a moment")
    match = _RANGE_KEY.fullmatch(label)
    return (kind, match["name"], (int(match["start"]), int(match["stop"]))) if match else (kind, label, None)


def _require_complete(folder: Path, what: str, pieces: list[Piece], numel: int) -> None:
    position = 0
    for piece in pieces:
        if piece.start < position:
            raise CheckpointError(f"{piece.file}: {piece.key} overlaps another piece")
        if piece.start > position:
            break
        position = piece.stop
    if position != numel:
        raise CheckpointError(f"{folder}: elements of {what} are missing, from {position} on")
