"""Runs of a parameter's elements inside the safetensors files: how they are named, and an index of them.

A whole parameter stands under its canonical name and in its shape; a run of its elements is flat,
under ``name[start:stop]``. Moments have the prefix ``exp_avg/`` or ``exp_avg_sq/``, in files of their own.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from pipeline.checkpoint.folder import part_of_file
from pipeline.errors import CheckpointError

#: Kinds of tensor, by the name of the ``Fragment`` attribute that holds them.
WEIGHT, EXP_AVG, EXP_AVG_SQ = "weight", "exp_avg", "exp_avg_sq"
KINDS = (WEIGHT, EXP_AVG, EXP_AVG_SQ)

_RUN = re.compile(r"(?P<name>.+)\[(?P<start>\d+):(?P<stop>\d+)\]")
_DTYPE = "F32"  # as safetensors names it


@dataclass(frozen=True)
class Piece:
    """A stored run of elements: ``key`` in ``file``."""

    file: Path
    key: str
    start: int
    stop: int


#: kind -> parameter -> its pieces by position, which cover it once
PieceIndex = dict[str, dict[str, list[Piece]]]


def piece_key(kind: str, name: str, run: tuple[int, int] | None) -> str:
    """The key of elements ``run`` of a flattened parameter; None: all of them, in their shape."""
    label = name if run is None else f"{name}[{run[0]}:{run[1]}]"
    return label if kind == WEIGHT else f"{kind}/{label}"


def parse_key(key: str, part: str) -> tuple[str, str, tuple[int, int] | None]:
    """Kind, parameter and run of a key in a file of ``weights`` or ``moments``.

    Raises:
        ValueError: a moment without its kind.
    """
    kind, label = WEIGHT, key
    if part == "moments":
        kind, _, label = key.partition("/")
        if kind not in (EXP_AVG, EXP_AVG_SQ):
            raise ValueError(f"{key!r} is no moment")
    match = _RUN.fullmatch(label)
    return (kind, match["name"], (int(match["start"]), int(match["stop"]))) if match else (kind, label, None)


def index_pieces(folder: Path, manifest: dict[str, Any]) -> PieceIndex:
    """Every stored piece, by reading headers only; all that loading relies on is checked.

    Raises:
        CheckpointError: a file that is no safetensors; a name, shape or dtype that the manifest does not
            allow; elements that are missing, or there twice.
    """
    shapes = {name: torch.Size(shape) for name, shape in manifest["parameters"].items()}
    index: PieceIndex = {kind: {name: [] for name in shapes} for kind in KINDS}
    for file in manifest["files"]:
        if part := part_of_file(file):
            for kind, name, piece in _pieces_of(folder / file, part[1], shapes):
                index[kind][name].append(piece)
    for kind, by_name in index.items():
        for name, pieces in by_name.items():
            pieces.sort(key=lambda piece: piece.start)
            _expect_whole(folder, f"{kind} of {name}", pieces, shapes[name].numel())
    return index


def _pieces_of(path: Path, part: str, shapes: dict[str, torch.Size]) -> Iterator[tuple[str, str, Piece]]:
    try:
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 - safe_open is no mapping
                stored = file.get_slice(key)
                yield _checked_piece(path, part, key, stored.get_shape(), stored.get_dtype(), shapes)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error})") from None


def _checked_piece(
    path: Path, part: str, key: str, shape: list[int], dtype: str, shapes: dict[str, torch.Size]
) -> tuple[str, str, Piece]:
    try:
        kind, name, run = parse_key(key, part)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from None
    if name not in shapes:
        raise CheckpointError(f"{path}: holds {key!r}, which the manifest does not name")
    if dtype != _DTYPE:
        raise CheckpointError(f"{path}: {key} is {dtype}, expected {_DTYPE}")
    start, stop = run or (0, shapes[name].numel())
    expected = [stop - start] if run else list(shapes[name])
    if not start < stop <= shapes[name].numel() or shape != expected:
        raise CheckpointError(f"{path}: {key} has shape {shape}, expected {expected} within {list(shapes[name])}")
    return kind, name, Piece(path, key, start, stop)


def _expect_whole(folder: Path, what: str, pieces: list[Piece], numel: int) -> None:
    position = 0
    for piece in pieces:
        if piece.start < position:
            raise CheckpointError(f"{piece.file}: {piece.key} overlaps another piece")
        if piece.start > position:
            break
        position = piece.stop
    if position != numel:
        raise CheckpointError(f"{folder}: elements of {what} are missing, from {position} on")
