"""What goes and what stays: older checkpoints, what crashed saves left, and branches that a run went back from."""

from __future__ import annotations

import itertools
import logging
import shutil
from pathlib import Path

from data_tools.storage.atomic import fsync_folder
from pipeline.checkpoint.folder import list_checkpoints, step_of
from pipeline.run_folder.layout import CHECKPOINTS_FOLDER

log = logging.getLogger(__name__)

ABANDONED_SUFFIX = ".abandoned"


def aside_path(folder: Path) -> Path:
    """The name under which a checkpoint is written until it is whole."""
    return folder.with_name(f".{folder.name}.partial")


def _doomed_path(folder: Path) -> Path:
    """The name under which a checkpoint is deleted; a new one of its step may be written meanwhile."""
    return folder.with_name(f".{folder.name}.deleted.partial")


def list_leftovers(run_folder: Path) -> list[Path]:
    """What interrupted saves and deletions left."""
    return sorted((run_folder / CHECKPOINTS_FOLDER).glob(".step_*.partial"))


def list_abandoned(run_folder: Path) -> list[Path]:
    """Checkpoints that a run set aside when it went back to an earlier one."""
    return sorted((run_folder / CHECKPOINTS_FOLDER).glob(f"step_*{ABANDONED_SUFFIX}*"))


def remove_leftovers(run_folder: Path) -> None:
    """Delete what interrupted saves and deletions left. No save may be under way.

    Raises:
        OSError: a leftover cannot be deleted.
    """
    for leftover in list_leftovers(run_folder):
        remove_folder(leftover)


def set_aside_after(run_folder: Path, step: int, origin: Path | None = None) -> None:
    """Rename the checkpoints after ``step``: the run goes on from there, and must not be taken for their origin.

    Args:
        origin: what the run goes on from; another checkpoint of that step is of another branch, and goes too.

    Raises:
        OSError: a folder cannot be renamed.
    """
    for folder in list_checkpoints(run_folder):
        other_branch = origin is not None and step_of(folder) == step and folder.resolve() != origin.resolve()
        if step_of(folder) > step or other_branch:
            abandoned = _free_name(folder)
            folder.rename(abandoned)
            fsync_folder(folder.parent)
            log.warning("set aside as %s: the run continues from step %d", abandoned, max(step, 0))


def _free_name(folder: Path) -> Path:
    for number in itertools.count(1):
        path = folder.with_name(folder.name + ABANDONED_SUFFIX + (f"-{number}" if number > 1 else ""))
        if not path.exists():
            return path
    raise AssertionError


def delete_checkpoint(folder: Path) -> None:
    """Delete a checkpoint so that no crash leaves a part of it under its name.

    Raises:
        OSError: it cannot be renamed or deleted.
    """
    doomed = _doomed_path(folder)
    if doomed.exists():
        remove_folder(doomed)
    folder.rename(doomed)
    fsync_folder(folder.parent)
    remove_folder(doomed)


def remove_folder(folder: Path) -> None:
    """Delete a folder under a temporary name. It may be a link to another disk: then the link goes.

    Raises:
        OSError: it cannot be deleted.
    """
    if folder.is_symlink():
        folder.unlink()
    else:
        shutil.rmtree(folder)


def delete_older(run_folder: Path, verified: Path, keep_last: int) -> None:
    """Delete the oldest beyond ``keep_last``, ``verified`` being the newest, which has proven good.

    Raises:
        OSError: one cannot be deleted.
    """
    until_verified = [folder for folder in list_checkpoints(run_folder) if step_of(folder) <= step_of(verified)]
    for folder in until_verified[:-keep_last]:
        delete_checkpoint(folder)
