"""Saving: every rank writes its own pieces; the folder appears whole or not at all."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from data_tools.storage import fsync_folder, publish, sha256_of_file, write_json_durably
from pipeline.backends import Backend, Fragment
from pipeline.checkpoint.folder import (
    CHECKPOINTS_FOLDER,
    FORMAT_VERSION,
    MANIFEST_FILE,
    STATE_FILE,
    TrainingState,
    find_damage,
    hash_of_json,
    list_checkpoints,
    step_of,
)
from pipeline.checkpoint.pieces import EXP_AVG, EXP_AVG_SQ, run_label
from pipeline.distributed import World
from pipeline.errors import CheckpointError

log = logging.getLogger(__name__)


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
            write_json_durably(aside / MANIFEST_FILE, {**manifest, "sha256": hash_of_json(manifest)})
            _replace(folder, aside)
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


def _replace(folder: Path, aside: Path) -> None:
    """Publish ``aside`` as ``folder``; an older one of the same step goes only once the new one stands."""
    older = folder.with_name(f".{folder.name}.older.partial")
    if folder.exists():
        folder.rename(older)
    publish(aside, folder)
    shutil.rmtree(older, ignore_errors=True)


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
        n = fragment.weight.numel()
        whole = n == torch.Size(shape).numel()
        key = fragment.name if whole else run_label(fragment.name, fragment.start, fragment.start + n)
        view = shape if whole else [-1]
        weights[key] = fragment.weight.cpu().view(view)
        moments[f"{EXP_AVG}/{key}"] = fragment.exp_avg.cpu().view(view)
        moments[f"{EXP_AVG_SQ}/{key}"] = fragment.exp_avg_sq.cpu().view(view)
    entries = {}
    for name, tensors in (("weights", weights), ("moments", moments)):
        path = folder / f"rank_{rank:05d}_{name}.safetensors"
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path)
        _fsync_file(path)
        entries[path.name] = _size_and_hash(path)
    return entries


def _fsync_file(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def _size_and_hash(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": sha256_of_file(path)}


def _versions() -> dict[str, str]:
    """Of what is installed: a run under DDP or FSDP needs no DeepSpeed."""
    installed = {}
    for package in ("torch", "deepspeed", "safetensors", "numpy"):
        with suppress(PackageNotFoundError):
            installed[package] = version(package)
    return installed


def _delete_older(run_folder: Path, written: Path, keep_last: int) -> None:
    """Drop the oldest beyond ``keep_last``, once the one just written has proven good.

    Later steps, which a run that went back to an earlier checkpoint left behind, neither count nor go.
    """
    if problem := find_damage(written):
        log.warning("the checkpoint just written does not verify, keeping all older ones: %s", problem)
        return
    until_written = [folder for folder in list_checkpoints(run_folder) if step_of(folder) <= step_of(written)]
    for folder in until_written[:-keep_last]:
        shutil.rmtree(folder)
    fsync_folder(written.parent)
