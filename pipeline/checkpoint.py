"""Portable checkpoints: saved from any backend and world size, loaded into any other.

A checkpoint is a folder ``checkpoints/step_00000100``:

``rank_00000_weights.safetensors``    pieces of the fp32 master weights, by canonical name
``rank_00000_moments.safetensors``    the same pieces of AdamW's two moments
``state.json``                        step, samples, loss scale, seed, resolved config, versions
``manifest.json``                     format version, parameter shapes, size and SHA-256 of every file and itself

Each rank writes the pieces that it holds and nothing is gathered; loading copies the overlap of
stored pieces and local ones, so no rank ever holds the whole state. No pickle is written or read.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from data_tools.storage import fsync_folder, publish, sha256_of_file, write_json_durably
from pipeline.backends import Backend, Fragment
from pipeline.distributed import World
from pipeline.errors import CheckpointError

log = logging.getLogger(__name__)

FORMAT_VERSION = 1
CHECKPOINTS_FOLDER = "checkpoints"
MANIFEST_FILE = "manifest.json"
STATE_FILE = "state.json"
_STEP_FOLDER = re.compile(r"step_(\d{8,})")
_PIECE_KEY = re.compile(r"(?P<name>.+)\[(?P<start>\d+):(?P<stop>\d+)\]")
_WEIGHT, _EXP_AVG, _EXP_AVG_SQ = "weight", "exp_avg", "exp_avg_sq"


@dataclass(frozen=True)
class TrainingState:
    """Where a run stands. Order of data and dropout follow from ``seed`` and ``samples``: no RNG state."""

    step: int  # finished optimizer steps, skipped ones included
    samples: int  # consumed, over all ranks
    tokens: int  # target tokens consumed
    updates: int  # applied optimizer steps: AdamW's own count
    loss_scale: float
    loss_scale_good_steps: int
    seed: int


# --- saving --------------------------------------------------------------------------------------


def save_checkpoint(
    run_folder: Path, state: TrainingState, config: dict[str, Any], backend: Backend, world: World, keep_last: int
) -> Path:
    """Write a checkpoint with all ranks, verify it, then delete the oldest beyond ``keep_last``.

    It is written aside, fsynced and renamed: under its final name it is whole. Collective.

    Returns:
        The folder.

    Raises:
        CheckpointError: a rank could not write (disk full, read-only, ...); nothing half-written is left.
    """
    folder = run_folder / CHECKPOINTS_FOLDER / f"step_{state.step:08d}"
    aside = folder.with_name(f".{folder.name}.partial")
    shapes = {name: list(shape) for name, shape in backend.parameter_shapes.items()}
    with _failing_together(world, aside):
        if world.is_main:
            _make_room(folder.parent, aside)
    files: dict[str, dict[str, Any]] = {}
    with _failing_together(world, aside):
        files = _write_pieces(aside, _own_share(backend, world), shapes, world.rank)
    files = {name: entry for of_rank in world.gather(files) for name, entry in of_rank.items()}
    with _failing_together(world, aside):
        if world.is_main:
            write_json_durably(aside / STATE_FILE, {**asdict(state), "config": config, "versions": _versions()})
            files[STATE_FILE] = _size_and_hash(aside / STATE_FILE)
            manifest = {"format_version": FORMAT_VERSION, "parameters": shapes, "files": files}
            write_json_durably(aside / MANIFEST_FILE, {**manifest, "sha256": _hash_of_json(manifest)})
            shutil.rmtree(folder, ignore_errors=True)  # a damaged one of the same step
            publish(aside, folder)
            _delete_older(run_folder, folder, keep_last)
    return folder


@contextmanager
def _failing_together(world: World, aside: Path) -> Iterator[None]:
    """A block that one rank cannot finish (disk full, ...) fails on every rank, so that none waits for it.

    Raises:
        CheckpointError: names the ranks and the reason; what was written aside is removed.
    """
    problem = None
    try:
        yield
    except (OSError, SafetensorError) as error:
        problem = f"rank {world.rank}: {getattr(error, 'strerror', None) or error}"
    problems = [text for text in world.gather(problem) if text]
    if problems:
        if world.is_main:
            shutil.rmtree(aside, ignore_errors=True)
        raise CheckpointError(f"cannot save {aside.parent / aside.stem[1:]}: {'; '.join(problems)}")


def _make_room(parent: Path, aside: Path) -> None:
    """An empty folder to write into; what crashed saves left is removed."""
    for leftover in parent.glob(".step_*.partial"):
        shutil.rmtree(leftover)
    aside.mkdir(parents=True)


def _own_share(backend: Backend, world: World) -> list[Fragment]:
    """What this rank writes: all that it holds, or its even part of what every rank holds."""
    fragments = backend.fragments()
    if not backend.replicated or world.size == 1:
        return fragments
    total = sum(fragment.weight.numel() for fragment in fragments)
    begin, end = total * world.rank // world.size, total * (world.rank + 1) // world.size
    share, position = [], 0
    for fragment in fragments:
        n = fragment.weight.numel()
        low, high = max(begin - position, 0), min(end - position, n)
        if low < high:
            share.append(_cut(fragment, low, high))
        position += n
    return share


def _cut(fragment: Fragment, low: int, high: int) -> Fragment:
    return Fragment(
        fragment.name,
        fragment.start + low,
        fragment.weight[low:high],
        fragment.exp_avg[low:high],
        fragment.exp_avg_sq[low:high],
    )


def _write_pieces(
    folder: Path, fragments: list[Fragment], shapes: dict[str, list[int]], rank: int
) -> dict[str, dict[str, Any]]:
    """Two files of this rank; returns their manifest entries."""
    weights, moments = {}, {}
    for fragment in fragments:
        shape = shapes[fragment.name]
        whole = fragment.weight.numel() == torch.Size(shape).numel()
        key, view = (fragment.name, shape) if whole else (_piece_key(fragment), [-1])
        weights[key] = fragment.weight.cpu().view(view)
        moments[f"{_EXP_AVG}/{key}"] = fragment.exp_avg.cpu().view(view)
        moments[f"{_EXP_AVG_SQ}/{key}"] = fragment.exp_avg_sq.cpu().view(view)
    entries = {}
    for name, tensors in (("weights", weights), ("moments", moments)):
        path = folder / f"rank_{rank:05d}_{name}.safetensors"
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path)
        _fsync_file(path)
        entries[path.name] = _size_and_hash(path)
    return entries


def _piece_key(fragment: Fragment) -> str:
    return f"{fragment.name}[{fragment.start}:{fragment.start + fragment.weight.numel()}]"


def _fsync_file(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def _size_and_hash(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": sha256_of_file(path)}


def _hash_of_json(value: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def _versions() -> dict[str, str]:
    return {package: version(package) for package in ("torch", "deepspeed", "safetensors", "numpy")}


def _delete_older(run_folder: Path, written: Path, keep_last: int) -> None:
    """Drop the oldest beyond ``keep_last``, once the one just written has proven good.

    Later steps, which a run that went back to an earlier checkpoint left behind, neither count nor go.
    """
    if problem := find_damage(written):
        log.warning("the checkpoint just written does not verify, keeping all older ones: %s", problem)
        return
    until_written = [folder for folder in list_checkpoints(run_folder) if folder.name <= written.name]
    for folder in until_written[:-keep_last]:
        shutil.rmtree(folder)
    fsync_folder(written.parent)


# --- finding -------------------------------------------------------------------------------------


def list_checkpoints(run_folder: Path) -> list[Path]:
    """Finished checkpoint folders of a run, oldest first. Nothing is verified."""
    parent = run_folder / CHECKPOINTS_FOLDER
    if not parent.is_dir():
        return []
    return sorted(folder for folder in parent.iterdir() if _STEP_FOLDER.fullmatch(folder.name))


def newest_good_checkpoint(run_folder: Path) -> Path | None:
    """The newest checkpoint that verifies; damaged ones are named in the log and passed over."""
    for folder in reversed(list_checkpoints(run_folder)):
        problem = find_damage(folder)
        if problem is None:
            return folder
        log.warning("skipping a damaged checkpoint: %s", problem)
    return None


def locate_checkpoint(path: Path) -> Path:
    """A checkpoint folder from a path to one, or to a run folder (its newest good one).

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    if (path / MANIFEST_FILE).is_file():
        if problem := find_damage(path):
            raise CheckpointError(f"{problem}; give another checkpoint, or the run folder for its newest good one")
        return path
    folder = newest_good_checkpoint(path)
    if folder is None:
        raise CheckpointError(
            f"{path}: no checkpoint here; expected a run folder with {CHECKPOINTS_FOLDER}/, "
            f"or a checkpoint folder with {MANIFEST_FILE}"
        )
    return folder


def find_damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint, in one line; None when every file has its size and hash."""
    try:
        manifest = read_manifest(folder)
    except CheckpointError as error:
        return str(error)
    for name, entry in manifest["files"].items():
        path = folder / name
        if not path.is_file():
            return f"{path}: missing"
        if path.stat().st_size != entry["bytes"]:
            return f"{path}: {path.stat().st_size} bytes, expected {entry['bytes']}"
        if sha256_of_file(path) != entry["sha256"]:
            return f"{path}: contents changed (SHA-256 differs from the manifest)"
    return None


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest, checked as far as other code relies on it.

    Raises:
        CheckpointError: missing, damaged, another version, or a file name that leaves the folder.
    """
    manifest = _read_json(folder / MANIFEST_FILE)
    if manifest.get("format_version") != FORMAT_VERSION:
        found = manifest.get("format_version")
        raise CheckpointError(
            f"{folder / MANIFEST_FILE}: format version {found!r}, this program reads {FORMAT_VERSION}"
        )
    if manifest.pop("sha256", None) != _hash_of_json(manifest):
        raise CheckpointError(f"{folder / MANIFEST_FILE}: contents changed (its own SHA-256 differs)")
    try:
        for name, entry in manifest["files"].items():
            if Path(name).name != name:
                raise CheckpointError(f"{folder / MANIFEST_FILE}: the file name {name!r} leaves the folder")
            int(entry["bytes"]), str(entry["sha256"])
        for shape in manifest["parameters"].values():
            torch.Size(shape)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise CheckpointError(f"{folder / MANIFEST_FILE}: malformed ({error})") from None
    return manifest


def read_state(folder: Path) -> tuple[TrainingState, dict[str, Any]]:
    """Where the run stood, and its resolved config.

    Raises:
        CheckpointError: the file is missing or malformed.
    """
    content = _read_json(folder / STATE_FILE)
    try:
        config = content.pop("config")
        content.pop("versions")
        return TrainingState(**content), config
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{folder / STATE_FILE}: malformed ({error})") from None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error})") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: expected a JSON object")
    return content


# --- loading -------------------------------------------------------------------------------------


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
    for kind in (_WEIGHT, _EXP_AVG, _EXP_AVG_SQ):
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
    pieces = _index_pieces(folder, _WEIGHT, shapes)
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
    which, prefix = ("weights", "") if kind == _WEIGHT else ("moments", f"{kind}/")
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
    match = _PIECE_KEY.fullmatch(label)
    name = match["name"] if match else label
    if name not in shapes:
        raise CheckpointError(f"{file}: holds {key!r}, which the model does not have")
    start, stop = (int(match["start"]), int(match["stop"])) if match else (0, torch.Size(shapes[name]).numel())
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
