"""Making room: the newest good checkpoints of a run stay, all else in its folder goes."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from pipeline.checkpoint.folder import FORMAT_VERSION, MANIFEST_FILE, list_checkpoints
from pipeline.checkpoint.inventory import is_checkpoint, readable_size, size_on_disk
from pipeline.checkpoint.retention import delete_checkpoint, list_abandoned, list_leftovers, remove_folder
from pipeline.checkpoint.verification import find_damage
from pipeline.errors import CheckpointError
from pipeline.run_folder.lock import lock_run_folder


@dataclass(frozen=True)
class Deletion:
    """A folder that goes, and why."""

    folder: Path
    bytes: int
    reason: str


@dataclass(frozen=True)
class Pruning:
    """What stays and what goes."""

    kept: list[Path]  # newest first
    deletions: list[Deletion]  # in the order in which they are deleted
    done: bool  # False: a dry run

    def __str__(self) -> str:
        lines = [f"keep    {folder.name:<26}{readable_size(size_on_disk(folder)):>10}" for folder in self.kept]
        lines += [
            f"delete  {deletion.folder.name:<26}{readable_size(deletion.bytes):>10}  {deletion.reason}"
            for deletion in self.deletions
        ]
        freed = readable_size(sum(deletion.bytes for deletion in self.deletions))
        return "\n".join([*lines, f"freed {freed}" if self.done else f"would free {freed}; nothing was deleted"])


def prune(run_folder: Path, keep: int, *, dry_run: bool) -> Pruning:
    """Delete all in a run's ``checkpoints`` but the newest ``keep`` that verify. The run folder is held meanwhile.

    Raises:
        ConfigError: a run is using the folder.
        CheckpointError: it is no run folder; no checkpoint of it verifies, so that nothing may go; or a folder
            cannot be deleted.
    """
    if is_checkpoint(run_folder):
        raise CheckpointError(f"{run_folder}: is a checkpoint; give the run folder that holds it")
    if not list_checkpoints(run_folder):
        raise CheckpointError(f"{run_folder}: no checkpoint here; expected a run folder")
    with lock_run_folder(run_folder):
        kept, deletions = _plan(run_folder, keep)
        if not dry_run:
            for deletion in deletions:
                _delete(deletion.folder)
    return Pruning(kept, deletions, done=not dry_run)


def _plan(run_folder: Path, keep: int) -> tuple[list[Path], list[Deletion]]:
    """What stays, and what goes: leftovers first, whose names the deletion of a checkpoint needs."""
    kept: list[Path] = []
    surplus: list[tuple[Path, str]] = []
    for folder in reversed(list_checkpoints(run_folder)):
        if len(kept) == keep:
            surplus.append((folder, "older than what is kept"))
            continue
        _expect_own_format(folder)
        if problem := find_damage(folder):
            surplus.append((folder, f"damaged: {problem}"))
        else:
            kept.append(folder)
    if not kept:
        raise CheckpointError(
            f"{run_folder}: no checkpoint of it verifies, so nothing was deleted; look at them with verify, "
            "and delete by hand what is of no use"
        )
    going = [(folder, "left by an interrupted save or deletion") for folder in list_leftovers(run_folder)]
    going += [(folder, "set aside when the run went back") for folder in list_abandoned(run_folder)]
    going += reversed(surplus)
    return kept, [Deletion(folder, size_on_disk(folder), reason) for folder, reason in going]


def _expect_own_format(folder: Path) -> None:
    """What another version of this program wrote cannot be judged, and is not damaged for that."""
    with suppress(OSError, ValueError, AttributeError):
        found = json.loads((folder / MANIFEST_FILE).read_text(encoding="utf-8")).get("format_version")
        if found != FORMAT_VERSION:
            raise CheckpointError(
                f"{folder}: format version {found!r}, this program knows {FORMAT_VERSION} and cannot judge it; "
                "prune with the program that wrote it"
            )


def _delete(folder: Path) -> None:
    try:
        if folder.name.startswith("."):
            remove_folder(folder)
        else:
            delete_checkpoint(folder)
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be deleted ({error.strerror or error})") from None
