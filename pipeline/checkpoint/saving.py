"""Writing a snapshot: every rank its own pieces; the folder appears whole or not at all."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from data_tools.storage.atomic import fsync_file, fsync_folder, publish, write_json_durably
from data_tools.storage.files import sha256_of_file, sha256_of_json
from pipeline.backends import Backend
from pipeline.checkpoint.folder import (
    FORMAT_VERSION,
    MANIFEST_FILE,
    STATE_FILE,
    StateFile,
    TrainingState,
    checkpoint_folder,
    part_of_file,
    pieces_file,
    read_manifest,
)
from pipeline.checkpoint.pieces import index_pieces
from pipeline.checkpoint.retention import aside_path, delete_checkpoint, delete_older
from pipeline.checkpoint.snapshot import Snapshot, SnapshotTaker
from pipeline.distributed.environment import launch_id
from pipeline.distributed.world import World
from pipeline.errors import CheckpointError

log = logging.getLogger(__name__)

Written = TypeVar("Written")
Files = dict[str, dict[str, Any]]  # name -> size and SHA-256


@dataclass(frozen=True)
class SavedCheckpoint:
    """A checkpoint that stands under its name and has been verified."""

    folder: Path
    bytes_of_rank: dict[int, int]
    seconds: float  # from the first byte to the verified folder

    @property
    def total_bytes(self) -> int:
        """Of all ranks' tensors."""
        return sum(self.bytes_of_rank.values())

    def __str__(self) -> str:
        rate = self.total_bytes / self.seconds / 1e6
        sizes = [f"rank {rank} {size / 1e6:,.1f} MB" for rank, size in self.bytes_of_rank.items()]
        if len(sizes) > 8:
            smallest, largest = min(self.bytes_of_rank.values()), max(self.bytes_of_rank.values())
            sizes = [f"{len(sizes)} ranks, {smallest / 1e6:,.1f} to {largest / 1e6:,.1f} MB each"]
        return f"saved {self.folder} in {self.seconds:.2f} s, {rate:,.0f} MB/s ({', '.join(sizes)})"


def save_checkpoint(
    run_folder: Path, state: TrainingState, config: dict[str, Any], backend: Backend, world: World, keep_last: int
) -> Path:
    """Write a checkpoint with all ranks while training waits. Collective. See ``write_checkpoint``."""
    return write_checkpoint(run_folder, SnapshotTaker(backend, world).take(state), config, world, keep_last).folder


def write_checkpoint(
    run_folder: Path, snapshot: Snapshot, config: dict[str, Any], world: World, keep_last: int
) -> SavedCheckpoint:
    """Write a snapshot with all ranks, verify it, then delete the oldest checkpoints beyond ``keep_last``.

    It is written aside, fsynced, read back against the hashes, and renamed: under its final name it is whole.
    Collective.

    Raises:
        CheckpointError: a rank could not write (disk full, read-only, ...) or read back what it wrote; nothing
            half-written is left, and no older checkpoint has been touched.
    """
    started = time.perf_counter()
    folder = checkpoint_folder(run_folder, snapshot.state.step)
    aside = aside_path(folder)
    attempt = SaveAttempt(world, aside)
    attempt.on_main(lambda: make_room(aside))
    own_files = attempt.on_all(lambda: _write_pieces(aside, snapshot, world.rank))
    files = {name: entry for of_rank in world.gather(own_files) for name, entry in of_rank.items()}
    attempt.on_main(lambda: write_metadata(aside, snapshot, config, world.size, files))
    attempt.on_main(lambda: publish_checkpoint(aside, folder))
    if world.is_main:
        _delete_older(run_folder, folder, keep_last)
    bytes_of_rank = dict.fromkeys(range(world.size), 0)
    for name, entry in files.items():
        if of_file := part_of_file(name):
            bytes_of_rank[of_file[0]] += entry["bytes"]
    return SavedCheckpoint(folder, bytes_of_rank, time.perf_counter() - started)


class SaveAttempt:
    """Steps of a save, each of which fails on every rank if it fails on one: none waits for another."""

    def __init__(self, world: World, aside: Path) -> None:
        self.world = world
        self.aside = aside

    def on_main(self, action: Callable[[], None]) -> None:
        """Do something on the main rank."""
        self.on_all(action if self.world.is_main else lambda: None)

    def on_all(self, action: Callable[[], Written]) -> Written:
        """Do something on every rank.

        Raises:
            CheckpointError: names the ranks and the reason; what was written aside is removed.
        """
        result: Written | None = None
        problem = None
        try:
            result = action()
        except (OSError, SafetensorError, CheckpointError) as error:
            problem = f"rank {self.world.rank}: {getattr(error, 'strerror', None) or error}"
        except Exception as error:
            self.world.gather(f"rank {self.world.rank}: {error!r}")  # a defect; the others must not wait
            raise
        problems = [text for text in self.world.gather(problem) if text]
        if problems:
            if self.world.is_main:
                shutil.rmtree(self.aside, ignore_errors=True)
            raise CheckpointError(f"cannot save {self.aside.parent / self.aside.stem[1:]}: {'; '.join(problems)}")
        return result  # type: ignore[return-value] # without a problem it is there


def make_room(aside: Path) -> None:
    """An empty folder to write into."""
    if aside.exists():
        shutil.rmtree(aside)
    aside.mkdir(parents=True)


def _write_pieces(aside: Path, snapshot: Snapshot, rank: int) -> Files:
    """Two files of this rank, durable and read back; returns their manifest entries."""
    files = {}
    for part, tensors in snapshot.parts.items():
        path = aside / pieces_file(rank, part)
        save_file(tensors, path)
        fsync_file(path)
        files[path.name] = _size_and_hash(path)
        _expect_written(path, tensors)
    return files


def _expect_written(path: Path, tensors: dict[str, Tensor]) -> None:
    """Compare a file with what was to be written into it; the file is mapped, not loaded."""
    with safe_open(path, framework="pt") as file:
        for key, tensor in tensors.items():
            if not torch.equal(file.get_tensor(key).view(torch.int32), tensor.view(torch.int32)):
                raise CheckpointError(f"{path.name}: {key} was not written as it should be")


def write_metadata(aside: Path, snapshot: Snapshot, config: dict[str, Any], world_size: int, files: Files) -> None:
    """State and manifest; then all headers are read back."""
    write_json_durably(
        aside / STATE_FILE, StateFile(snapshot.state, config, world_size, _versions(), launch_id()).to_json()
    )
    manifest = {
        "format_version": FORMAT_VERSION,
        "parameters": snapshot.shapes,
        "files": {**files, STATE_FILE: _size_and_hash(aside / STATE_FILE)},
    }
    write_json_durably(aside / MANIFEST_FILE, {**manifest, "sha256": sha256_of_json(manifest)})
    fsync_folder(aside)
    index_pieces(aside, read_manifest(aside))


def publish_checkpoint(aside: Path, folder: Path) -> None:
    """Give a finished checkpoint its name."""
    if folder.exists():  # a damaged one of the same step; the run has come from an older one
        delete_checkpoint(folder)
    publish(aside, folder)


def _delete_older(run_folder: Path, folder: Path, keep_last: int) -> None:
    """What cannot be deleted does not make the new checkpoint worse."""
    try:
        delete_older(run_folder, folder, keep_last)
    except OSError as error:
        log.warning("cannot delete older checkpoints of %s: %s", run_folder, error)


def _size_and_hash(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": sha256_of_file(path)}


def _versions() -> dict[str, str]:
    """Of what is installed: a run under DDP or FSDP needs no DeepSpeed."""
    installed = {}
    for package in ("torch", "deepspeed", "safetensors", "numpy"):
        with suppress(PackageNotFoundError):
            installed[package] = version(package)
    return installed
