"""Verifying checkpoints, and finding the newest good one of a run."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from data_tools.storage.files import sha256_of_file
from pipeline.checkpoint.layout import (
    MANIFEST_FILE,
    format_size,
    is_checkpoint,
    list_checkpoints,
    read_manifest,
    size_of_folder,
)
from pipeline.checkpoint.pieces import index_pieces
from pipeline.checkpoint.state import read_state_file
from pipeline.errors import CheckpointError
from pipeline.run_folder.layout import CHECKPOINTS_FOLDER

log = logging.getLogger(__name__)


def find_damage(folder: Path) -> str | None:
    """Return what is wrong with a checkpoint in one line, or None if it is good.

    Checks the size and the hash of every file, then the state and the headers of all tensors.
    """
    try:
        manifest = read_manifest(folder)
        entries = manifest["files"].items()
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:  # hashing releases the GIL
            problems = list(threads.map(lambda item: _find_file_damage(folder / item[0], item[1]), entries))
        if problem := next(filter(None, problems), None):
            return problem
        read_state_file(folder)
        index_pieces(folder, manifest)
    except CheckpointError as error:
        return str(error)
    return None


def find_size_damage(path: Path, entry: dict[str, Any]) -> str | None:
    """Return what is wrong if a file is a link, is missing, or has another size than in the manifest; else None."""
    if path.is_symlink():
        return f"{path}: is a link, which may point outside the folder; expected a file"
    if not path.is_file():
        return f"{path}: missing"
    if (size := path.stat().st_size) != entry["bytes"]:
        return f"{path}: {size} bytes, expected {entry['bytes']}"
    return None


def _find_file_damage(path: Path, entry: dict[str, Any]) -> str | None:
    try:
        if problem := find_size_damage(path, entry):
            return problem
        if sha256_of_file(path) != entry["sha256"]:
            return f"{path}: contents changed (SHA-256 differs from the manifest)"
    except OSError as error:
        return f"{path}: cannot be read ({error.strerror})"
    return None


def newest_good_checkpoint(run_folder: Path) -> Path | None:
    """Return the newest checkpoint of a run that verifies, if any. Log each damaged one that is skipped."""
    for folder in reversed(list_checkpoints(run_folder)):
        problem = find_damage(folder)
        if problem is None:
            return folder
        log.warning("skipping a damaged checkpoint: %s", problem)
    return None


def locate_checkpoint(path: Path) -> Path:
    """Return the checkpoint at a path, or a run folder's newest good one. Raise CheckpointError if none is good."""
    if (path / MANIFEST_FILE).is_file():
        if problem := find_damage(path):
            raise CheckpointError(f"{problem}; give another checkpoint, or the run folder for its newest good one")
        return path
    folder = newest_good_checkpoint(path)
    if folder is None:
        raise no_checkpoint_error(path)
    return folder


def verify_checkpoints(path: Path, print_line: Callable[[str], None]) -> None:
    """Verify a checkpoint, or all checkpoints of a run, oldest first.

    Args:
        print_line: receives one line per checkpoint when it is verified, then one with the speed.

    Raises:
        CheckpointError: there is no checkpoint, or some are damaged.
    """
    folders = [path] if is_checkpoint(path) else list_checkpoints(path)
    if not folders:
        raise no_checkpoint_error(path)
    started, hashed, damaged = time.perf_counter(), 0, 0
    for folder in folders:
        problem = find_damage(folder)
        hashed += size_of_folder(folder)
        damaged += problem is not None
        print_line(f"damaged  {problem}" if problem else f"ok       {folder}")
    seconds = time.perf_counter() - started
    print_line(f"read {format_size(hashed)} in {seconds:.2f} s, {hashed / seconds / 1e6:,.0f} MB/s")
    if damaged:
        raise CheckpointError(
            f"{path}: damaged checkpoints: {damaged} of {len(folders)}; continue from a good one "
            "(--resume auto skips damaged ones)"
        )


def no_checkpoint_error(path: Path) -> CheckpointError:
    """Return the error for a path that is neither a checkpoint nor a run with checkpoints."""
    return CheckpointError(
        f"{path}: no checkpoint here; expected a run folder with {CHECKPOINTS_FOLDER}/, "
        f"or a checkpoint folder with {MANIFEST_FILE}"
    )
