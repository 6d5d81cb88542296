"""Delete old checkpoints. If a run continues from an earlier step, rename the checkpoints of later steps.

A *milestone* is a checkpoint whose step is a multiple of ``checkpoint.keep_every_steps``. Milestones are not deleted.
"""

import itertools
import json
import logging
import shutil
from collections.abc import Callable, Iterable, Set
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from data_tools.formatting import format_size
from data_tools.storage.atomic import fsync_folder
from pipeline.checkpoint.layout import (
    MANIFEST_FILE,
    STEP_PREFIX,
    is_checkpoint,
    list_checkpoints,
    size_of_folder,
    step_of,
)
from pipeline.checkpoint.manifest import (
    READABLE_VERSIONS,
    CheckpointManifest,
    describe_readable_versions,
    find_not_finite,
    read_manifest,
)
from pipeline.checkpoint.state import StateFile, config_section, read_state_file
from pipeline.checkpoint.verification import find_damage
from pipeline.errors import CheckpointError
from pipeline.run_folder.layout import CHECKPOINTS_FOLDER
from pipeline.run_folder.lock import lock_run_folder

log = logging.getLogger(__name__)

_ABANDONED = ".abandoned"  # follows the name of a checkpoint that was set aside


def list_leftovers(run_folder: Path) -> list[Path]:
    """Return the incomplete folders that interrupted saves and deletions have left."""
    return sorted((run_folder / CHECKPOINTS_FOLDER).glob(f".{STEP_PREFIX}*.partial"))


def list_abandoned(run_folder: Path) -> list[Path]:
    """Return the checkpoints that were renamed because the run continued from an earlier step."""
    return sorted((run_folder / CHECKPOINTS_FOLDER).glob(f"{STEP_PREFIX}*{_ABANDONED}*"))


def remove_leftovers(run_folder: Path) -> None:
    """Delete the incomplete folders that interrupted saves and deletions have left.

    Do not call this function while a checkpoint is being saved.
    """
    for leftover in list_leftovers(run_folder):
        _remove_folder(leftover)


def set_aside_after(run_folder: Path, step: int, origin: Path | None = None) -> None:
    """Rename the checkpoints of all steps after ``step``, so that no run resumes from them.

    Args:
        origin: the checkpoint from which the run continues. If ``origin`` is in another run folder, the checkpoint of
            ``step`` in ``run_folder`` is renamed too.
    """
    for folder in list_checkpoints(run_folder):
        other_branch = origin is not None and step_of(folder) == step and folder.resolve() != origin.resolve()
        if step_of(folder) > step or other_branch:
            abandoned = _unused_abandoned_path(folder)
            folder.rename(abandoned)
            fsync_folder(folder.parent)
            log.warning("set aside as %s: the run continues from step %d", abandoned, step)


def _unused_abandoned_path(folder: Path) -> Path:
    names = (f"{folder.name}{_ABANDONED}" + (f"-{n}" if n > 1 else "") for n in itertools.count(1))
    return next(path for path in map(folder.with_name, names) if not path.exists())


def delete_checkpoint(folder: Path) -> None:
    """Delete a checkpoint. If the deletion is interrupted, the remaining files do not count as a checkpoint."""
    # Do not use hidden_partial_path(folder): it may contain a new checkpoint of this step.
    temporary = folder.with_name(f".{folder.name}.deleted.partial")
    if temporary.exists():
        _remove_folder(temporary)
    folder.rename(temporary)
    fsync_folder(folder.parent)
    _remove_folder(temporary)


def _remove_folder(folder: Path) -> None:
    if folder.is_symlink():  # a link to a checkpoint that the user moved to another disk
        folder.unlink()
    else:
        shutil.rmtree(folder)


def surplus_steps(
    steps: Iterable[int],
    newest: int,
    keep_last: int,
    best: int | None,
    find_manifest: Callable[[int], CheckpointManifest],
) -> list[int]:
    """Return the steps up to ``newest`` whose checkpoints are not needed, in ascending order.

    The caller must remove milestones from the result.

    Args:
        newest: the step of the newest verified checkpoint. It is kept.
        keep_last: the number of checkpoints to keep. Checkpoints with NaN or infinite numbers do not count, because no
            run can resume from them. Among the newest checkpoints, those without a readable manifest do not count
            either, but they are kept, because another version of this program may be able to read them.
        best: the step with the lowest validation loss, or None if its checkpoint need not be kept.
        find_manifest: returns the manifest of the checkpoint of a step. Called only for the newest steps.
    """
    surplus: list[int] = []
    kept = 0
    for step in sorted((step for step in steps if step <= newest), reverse=True):
        counts = False
        if kept < keep_last:
            try:
                counts = find_not_finite(find_manifest(step).files) is None
            except CheckpointError:
                continue
        kept += counts
        if not counts and step not in (newest, best):
            surplus.append(step)
    return surplus[::-1]


def delete_older(run_folder: Path, verified: Path, keep_last: int, pinned: Set[int] = frozenset()) -> None:
    """Delete old checkpoints. Call this function after a new checkpoint was verified.

    These checkpoints are kept:

    - ``verified``, and all later checkpoints;
    - the ``keep_last`` newest checkpoints, including ``verified``. Checkpoints with NaN or infinite numbers, and those
      without a readable manifest, do not count;
    - the checkpoints without a readable manifest that are newer than the oldest of these;
    - the checkpoints whose step is a multiple of ``checkpoint.keep_every_steps``;
    - if ``checkpoint.keep_best`` is True, the checkpoint with the lowest validation loss;
    - the checkpoints of the steps in ``pinned``.

    Raises CheckpointError if the state of ``verified`` cannot be read.
    """
    folders = {step_of(folder): folder for folder in list_checkpoints(run_folder)}
    newest, best = step_of(verified), best_step(verified)
    for step in surplus_steps(folders, newest, keep_last, best, lambda step: read_manifest(folders[step])):
        if step not in pinned and not is_milestone(folders[step]):
            delete_checkpoint(folders[step])


def is_milestone(folder: Path) -> bool:
    """Return whether a checkpoint is a milestone. If its ``state.json`` is damaged, the result is False."""
    with suppress(CheckpointError):
        return is_state_of_milestone(read_state_file(folder))
    return False


def is_state_of_milestone(state: StateFile) -> bool:
    """Return whether the checkpoint of ``state`` is a milestone."""
    every_steps = config_section(state.config, "checkpoint").get("keep_every_steps")
    return isinstance(every_steps, int) and every_steps > 0 and state.step % every_steps == 0


def best_step(newest: Path) -> int | None:
    """Return the step with the run's lowest validation loss.

    Returns None if ``checkpoint.keep_best`` is not true, or if the run has not measured a validation loss yet.
    Raises CheckpointError if the ``state.json`` of ``newest``, the newest checkpoint, cannot be read.
    """
    state = read_state_file(newest)
    keeps_best = config_section(state.config, "checkpoint").get("keep_best")
    return state.validation.best_step if keeps_best is True else None


@dataclass(frozen=True)
class Pruning:
    kept: list[Path]  # newest first
    deletions: list[tuple[Path, int, str]]  # (folder, bytes, reason), in the order of deletion
    done: bool  # False for a dry run

    def __str__(self) -> str:
        lines = [f"keep    {folder.name:<26}{format_size(size_of_folder(folder)):>10}" for folder in self.kept]
        for folder, size, reason in self.deletions:
            lines.append(f"delete  {folder.name:<26}{format_size(size):>10}  {reason}")
        freed = format_size(sum(size for _, size, _ in self.deletions))
        return "\n".join([*lines, f"freed {freed}" if self.done else f"would free {freed}; nothing was deleted"])


def prune(run_folder: Path, keep: int, *, dry_run: bool) -> Pruning:
    """Keep the newest ``keep`` undamaged checkpoints of a run. Delete everything else in the folder ``checkpoints``.

    Undamaged milestones (``checkpoint.keep_every_steps``) and the best checkpoint (``checkpoint.keep_best``) are kept
    too.

    Args:
        dry_run: if True, only report what would be deleted.

    Raises:
        ConfigError: another process uses the run folder.
        CheckpointError: there is no run, no checkpoint passes verification, or a folder cannot be deleted.
    """
    if is_checkpoint(run_folder):
        raise CheckpointError(f"{run_folder}: is a checkpoint; give the run folder that holds it")
    if not list_checkpoints(run_folder):
        raise CheckpointError(f"{run_folder}: no checkpoint here; expected a run folder")
    with lock_run_folder(run_folder):
        kept, deletions = _plan_pruning(run_folder, keep)
        for folder, _, _ in [] if dry_run else deletions:
            delete = _remove_folder if folder.name.startswith(".") else delete_checkpoint
            try:
                delete(folder)
            except OSError as error:
                raise CheckpointError(f"{folder}: cannot be deleted ({error.strerror or error})") from None
    return Pruning(kept, deletions, done=not dry_run)


def _plan_pruning(run_folder: Path, keep: int) -> tuple[list[Path], list[tuple[Path, int, str]]]:
    """Return the checkpoints to keep, and (folder, bytes, reason) for each folder to delete.

    Incomplete folders come first, because ``delete_checkpoint`` can remove an incomplete folder of the same step.
    """
    kept: list[Path] = []
    best = None
    surplus: list[tuple[Path, str]] = []
    for folder in reversed(list_checkpoints(run_folder)):
        if len(kept) >= keep and step_of(folder) != best and not is_milestone(folder):
            surplus.append((folder, "older than what is kept"))
            continue
        _require_known_format(folder)
        if problem := find_damage(folder):
            surplus.append((folder, f"damaged: {problem}"))
        else:
            best = best if kept else best_step(folder)
            kept.append(folder)
    if not kept:
        raise CheckpointError(
            f"{run_folder}: none of its checkpoints verifies, so nothing was deleted; check them with verify, "
            "and delete by hand those that you do not need"
        )
    unneeded = [(folder, "left by an interrupted save or deletion") for folder in list_leftovers(run_folder)]
    unneeded += [(folder, "set aside when the run went back") for folder in list_abandoned(run_folder)]
    unneeded += reversed(surplus)
    return kept, [(folder, size_of_folder(folder), reason) for folder, reason in unneeded]


def _require_known_format(folder: Path) -> None:
    """Raise CheckpointError if a checkpoint has an unknown format version. Such a checkpoint cannot be verified."""
    with suppress(OSError, ValueError, AttributeError):
        found = json.loads((folder / MANIFEST_FILE).read_text(encoding="utf-8")).get("format_version")
        if found not in READABLE_VERSIONS:
            raise CheckpointError(
                f"{folder}: format version {found!r}, this program knows {describe_readable_versions()} and cannot "
                "verify it; "
                "prune with the program that wrote it"
            )
