"""Write a checkpoint. All ranks write into one temporary folder, and the main rank then renames this folder."""

import logging
import shutil
import time
from collections.abc import Callable, Set
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

from data_tools.errors import PROJECT, UserError, describe_error
from data_tools.storage.atomic import fsync_folder, hidden_partial_path, make_empty_folder, publish, write_json_durably
from data_tools.storage.sha256 import sha256_of_file
from pipeline.checkpoint.layout import MANIFEST_FILE, STATE_FILE, checkpoint_folder, tensor_file
from pipeline.checkpoint.manifest import CheckpointManifest, FileEntry, Files, find_not_finite, read_manifest
from pipeline.checkpoint.pieces import index_pieces
from pipeline.checkpoint.retention import delete_checkpoint, delete_older
from pipeline.checkpoint.state import StateFile, TrainingState
from pipeline.checkpoint.tensor_stream import TensorGroups, write_tensors
from pipeline.distributed.environment import launch_id
from pipeline.distributed.world import World
from pipeline.errors import CheckpointError
from pipeline.model.parameter_state import StateNames

log = logging.getLogger(__name__)

Result = TypeVar("Result")


@dataclass(frozen=True)
class Snapshot:
    """A copy of the state that this rank writes into a checkpoint."""

    state: TrainingState
    shapes: dict[str, list[int]]  # the shapes of all parameters, by canonical name
    state_names: StateNames  # the names of each parameter's optimizer tensors
    groups: TensorGroups
    averaged_steps: tuple[int, ...] = ()  # see StateFile


@dataclass(frozen=True)
class SavedCheckpoint:
    """A complete checkpoint. The ranks have read back its tensor files, and found the bytes that they wrote.

    ``write_tensors`` says where the files were read from.

    If the state contained NaN or infinite numbers, ``not_finite`` names a file with such numbers. No run can resume
    from this checkpoint.
    """

    folder: Path
    bytes_of_rank: dict[int, int]
    seconds: float  # the time from the first written byte to the finished folder
    not_finite: str | None = None  # the result of ``find_not_finite``

    @property
    def total_bytes(self) -> int:
        """Return the total size in bytes of all ranks' tensor files."""
        return sum(self.bytes_of_rank.values())

    def __str__(self) -> str:
        rate = self.total_bytes / self.seconds / 1e6
        sizes = [f"rank {rank} {size / 1e6:,.1f} MB" for rank, size in self.bytes_of_rank.items()]
        if len(sizes) > 8:
            smallest, largest = min(self.bytes_of_rank.values()), max(self.bytes_of_rank.values())
            sizes = [f"{len(sizes)} ranks, {smallest / 1e6:,.1f} to {largest / 1e6:,.1f} MB each"]
        saved = f"saved {self.folder} in {self.seconds:.2f} s, {rate:,.0f} MB/s ({', '.join(sizes)})"
        return f"{saved}, but {self.not_finite}: no run can resume from it" if self.not_finite else saved


def write_checkpoint(
    run_folder: Path,
    snapshot: Snapshot,
    config: dict[str, Any],
    world: World,
    keep_last: int,
    pinned: Callable[[], AbstractContextManager[Set[int]]] = lambda: nullcontext(frozenset()),
) -> SavedCheckpoint:
    """Write a checkpoint and verify the written bytes. Then delete old checkpoints with ``delete_older``.

    A state with NaN or infinite numbers is saved too, because its other numbers may be of use.

    This call is collective: every rank must make it.

    Args:
        config: the resolved config to store in the checkpoint.
        pinned: returns a context manager that gives the steps whose checkpoints must be kept. Old checkpoints are
            deleted inside its block.

    Raises:
        CheckpointError: a rank could not write a file, or read back different bytes. The incomplete folder is removed,
            and no old checkpoint is deleted.
    """
    started = time.perf_counter()
    folder = checkpoint_folder(run_folder, snapshot.state.step)
    aside = hidden_partial_path(folder)
    state = StateFile(
        **vars(snapshot.state),
        averaged_steps=snapshot.averaged_steps,
        world_size=world.size,
        launch_id=launch_id(),
        versions=package_versions(),
        config=config,
    )
    try:
        on_main_rank(world, lambda: make_empty_folder(aside))
        own_files = on_every_rank(world, lambda: write_tensor_files(aside, snapshot, world.rank))
        files_of_ranks: list[Files] = world.gather(own_files)
        all_files = {name: entry for files in files_of_ranks for name, entry in files.items()}
        on_main_rank(world, lambda: complete_and_publish(aside, folder, state, snapshot, all_files))
    except CheckpointError as error:
        if world.is_main:
            shutil.rmtree(aside, ignore_errors=True)
        raise CheckpointError(f"cannot save {folder}: {error}") from None
    bytes_of_rank = {rank: sum(entry.bytes for entry in files.values()) for rank, files in enumerate(files_of_ranks)}
    saved = SavedCheckpoint(folder, bytes_of_rank, time.perf_counter() - started, find_not_finite(all_files))
    if world.is_main:
        try:
            with pinned() as steps:
                delete_older(run_folder, folder, keep_last, steps)
        except (OSError, CheckpointError) as error:  # the new checkpoint is complete, so this is not an error
            log.warning("cannot delete older checkpoints of %s: %s", run_folder, error)
    return saved


def on_main_rank(world: World, step: Callable[[], None]) -> None:
    """Call ``step`` on the main rank. This call is collective: every rank must make it.

    If ``step`` fails, all ranks raise CheckpointError.
    """
    on_every_rank(world, step if world.is_main else lambda: None)


def on_every_rank(world: World, step: Callable[[], Result]) -> Result:
    """Call ``step`` on every rank, and return this rank's result. This call is collective.

    If ``step`` fails on one rank, all ranks raise CheckpointError, so no rank hangs in the next collective. The rank
    logs the traceback of an unexpected error.
    """
    result: Result | None = None
    problem = None
    try:
        result = step()
    except (OSError, UserError) as error:
        problem = f"rank {world.rank}: {getattr(error, 'strerror', None) or error}"
    except Exception as error:
        log.exception("rank %d: an unexpected error in a checkpoint", world.rank)
        problem = f"rank {world.rank}: {describe_error(error)}"
    if problems := [text for text in world.gather(problem) if text]:
        raise CheckpointError("; ".join(problems))
    return result  # type: ignore[return-value] # the result is set if no rank has a problem


def write_tensor_files(aside: Path, snapshot: Snapshot, rank: int) -> Files:
    """Write one rank's tensor files into the temporary folder ``aside``, and return their manifest entries."""
    names = {group: tensor_file(rank, group) for group in snapshot.groups}
    return {name: write_tensors(aside / name, snapshot.groups[group]) for group, name in names.items()}


def complete_and_publish(aside: Path, folder: Path, state: StateFile, snapshot: Snapshot, tensor_files: Files) -> None:
    """Write the JSON files, check the tensor files' headers, and rename the folder ``aside`` to ``folder``."""
    state_path = aside / STATE_FILE
    write_json_durably(state_path, asdict(state))
    manifest = CheckpointManifest(
        parameters=snapshot.shapes,
        optimizer_state={name: list(kinds) for name, kinds in snapshot.state_names.items()},
        files={**tensor_files, STATE_FILE: FileEntry(state_path.stat().st_size, sha256_of_file(state_path))},
    )
    write_json_durably(aside / MANIFEST_FILE, manifest.to_json())
    index_pieces(aside, read_manifest(aside))
    publish_checkpoint(aside, folder)


def publish_checkpoint(aside: Path, folder: Path) -> None:
    """Rename the temporary folder ``aside`` to ``folder``. An existing ``folder`` is replaced.

    The ranks must have fsynced all files in ``aside``.
    """
    if folder.exists():  # damaged: otherwise the run would have continued from this checkpoint
        delete_checkpoint(folder)
    fsync_folder(aside)
    publish(aside, folder)


def package_versions() -> dict[str, str]:
    """Return the versions of this project and of the main packages, if they are installed."""
    installed = {}
    for package in (PROJECT, "torch", "deepspeed", "safetensors", "numpy"):
        with suppress(PackageNotFoundError):
            installed[package] = version(package)
    return installed
