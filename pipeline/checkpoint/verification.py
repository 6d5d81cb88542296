"""Whether a checkpoint is whole, and which one of a run is the newest that is."""

from __future__ import annotations

import logging
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from data_tools.storage.files import sha256_of_file
from pipeline.checkpoint.folder import MANIFEST_FILE, list_checkpoints, read_manifest, read_state_file
from pipeline.checkpoint.pieces import index_pieces
from pipeline.errors import CheckpointError
from pipeline.run_folder.layout import CHECKPOINTS_FOLDER

log = logging.getLogger(__name__)


def find_damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint, in one line; None when every file is what the manifest says.

    Sizes and hashes first, then the state and the headers of all tensors.
    """
    try:
        manifest = read_manifest(folder)
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:  # hashing releases the interpreter
            problems = list(threads.map(lambda item: find_file_damage(folder / item[0], item[1]), _files(manifest)))
        for problem in problems:
            if problem:
                return problem
        read_state_file(folder)
        index_pieces(folder, manifest)
    except CheckpointError as error:
        return str(error)
    return None


def find_file_damage(path: Path, entry: dict[str, Any]) -> str | None:
    """How a file differs from its manifest entry (``bytes``, ``sha256``), in one line; None: not at all."""
    try:
        if path.is_symlink():
            return f"{path}: is a link, which may leave the folder; expected a file"
        if not path.is_file():
            return f"{path}: missing"
        if path.stat().st_size != entry["bytes"]:
            return f"{path}: {path.stat().st_size} bytes, expected {entry['bytes']}"
        if sha256_of_file(path) != entry["sha256"]:
            return f"{path}: contents changed (SHA-256 differs from the manifest)"
    except OSError as error:
        return f"{path}: cannot be read ({error.strerror})"
    return None


def _files(manifest: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    return list(manifest["files"].items())


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
        raise nothing_here(path)
    return folder


def nothing_here(path: Path) -> CheckpointError:
    """The error for a path that holds neither a checkpoint nor a run with one."""
    return CheckpointError(
        f"{path}: no checkpoint here; expected a run folder with {CHECKPOINTS_FOLDER}/, "
        f"or a checkpoint folder with {MANIFEST_FILE}"
    )
