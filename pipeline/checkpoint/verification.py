"""Verify checkpoints, and find the newest good checkpoint of a run."""

import logging
import os
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from data_tools.formatting import format_size
from data_tools.limits import available_cores
from data_tools.storage.content import describe_content
from data_tools.storage.sha256 import sha256_of_file
from pipeline.checkpoint.finite import describe_not_finite
from pipeline.checkpoint.hashing import HashFile
from pipeline.checkpoint.layout import (
    MANIFEST_FILE,
    is_checkpoint,
    list_checkpoints,
    no_checkpoint_error,
    parse_tensor_file,
    size_of_folder,
)
from pipeline.checkpoint.manifest import FileEntry, read_manifest
from pipeline.checkpoint.pieces import index_pieces, manifest_of_weights, open_tensors
from pipeline.checkpoint.state import read_state_file
from pipeline.errors import CheckpointError

log = logging.getLogger(__name__)

Item = TypeVar("Item")
Result = TypeVar("Result")


def find_damage(folder: Path, hash_file: HashFile = sha256_of_file, weights: str | None = None) -> str | None:
    """Return a description of the first problem of a checkpoint, or None if the checkpoint is good.

    The checks, in this order:

    - the manifest;
    - the size and the hash of every file;
    - ``state.json``;
    - the headers of the tensor files;
    - whether all tensors are finite, unless the manifest says so.

    Args:
        weights: ``training`` or ``ema`` to check only the files that a reader of these weights needs.
    """
    try:
        manifest = read_manifest(folder)
        if weights is not None:
            manifest = manifest_of_weights(manifest, weights)
        files = manifest.files.items()
        if problem := _find_first(lambda item: _find_file_damage(folder / item[0], item[1], hash_file), files):
            return problem
        read_state_file(folder)
        index_pieces(folder, manifest)
        unknown = [name for name, entry in files if parse_tensor_file(name) and not entry.finite]
        return _find_first(_find_not_finite, (folder / name for name in unknown))
    except CheckpointError as error:
        return str(error)


def _find_first(find: Callable[[Item], str | None], items: Iterable[Item]) -> str | None:
    """Return the first problem that ``find`` returns for an item, or None. Checks items in parallel."""
    with ThreadPoolExecutor(min(8, available_cores())) as threads:
        return next(filter(None, list(threads.map(find, items))), None)


def _find_not_finite(path: Path) -> str | None:
    with open_tensors(path) as file:
        for key in file.keys():  # noqa: SIM118 - safe_open is not a mapping
            if problem := describe_not_finite(file.get_tensor(key)):
                return f"{path}: {key}: {problem}"
    return None


def find_size_damage(path: Path, entry: FileEntry) -> str | None:
    """Return a message if a file is missing, is a link, or has the wrong size. Otherwise, return None.

    Args:
        entry: the file's entry in the manifest.
    """
    if path.is_symlink():
        return f"{path}: is a link, which may point outside the folder; expected a file"
    if not path.is_file():
        return f"{path}: missing"
    if (size := path.stat().st_size) != entry.bytes:
        return f"{path}: {describe_content(path) or f'{size} bytes'}, expected {entry.bytes} bytes"
    return None


def _find_file_damage(path: Path, entry: FileEntry, hash_file: HashFile) -> str | None:
    try:
        if problem := find_size_damage(path, entry):
            return problem
        if hash_file(path) != entry.sha256:
            return f"{path}: contents changed (SHA-256 differs from the manifest)"
    except OSError as error:
        return f"{path}: cannot be read ({error.strerror})"
    return None


def newest_good_checkpoint(
    run_folder: Path, hash_file: HashFile = sha256_of_file, weights: str | None = None
) -> Path | None:
    """Return the newest undamaged checkpoint (see ``find_damage``), or None.

    Log each damaged checkpoint that is newer than the result. A run that is still training can delete a checkpoint
    while this function reads it. The function then looks for newer checkpoints.
    """
    folders, deleted = list_checkpoints(run_folder), set[Path]()
    while folders:
        folder = folders.pop()
        problem = find_damage(folder, hash_file, weights)
        if problem is None:
            return folder
        if folder not in deleted and folder_was_deleted(folder):
            deleted.add(folder)  # a network disk can list a deleted folder again
            folders = list_checkpoints(run_folder)
        else:
            log.warning("skipping a damaged checkpoint: %s", problem)
    return None


def folder_was_deleted(folder: Path) -> bool:
    """Return whether the folder of a checkpoint no longer exists. A link to a missing folder still exists.

    A folder that cannot be read still exists.
    """
    try:
        os.lstat(folder)  # not os.path.lexists(), which is False after every failure of the disk
    except (FileNotFoundError, NotADirectoryError):
        return True
    except OSError:
        return False
    return False


def read_located(locate: Callable[[], Path], read: Callable[[Path], Result]) -> Result:
    """Return ``read(locate())``. Do this again if the checkpoint is deleted while ``read`` reads it.

    A run that is still training deletes old checkpoints (``checkpoint.keep_last``).

    Args:
        locate: returns a good checkpoint, or raises CheckpointError.
        read: raises CheckpointError if a file cannot be read.
    """
    while True:
        folder = locate()
        try:
            return read(folder)
        except CheckpointError:
            if not folder_was_deleted(folder):
                raise
            log_deletion(folder)


def log_deletion(place: Path | str) -> None:
    """Log that a checkpoint was deleted while this program read it."""
    log.info("%s; looking again", describe_deletion(place))


def describe_deletion(place: Path | str) -> str:
    """Return a text that says that a checkpoint was deleted while this program read it."""
    return f"{place} was deleted while it was read, probably by its run (checkpoint.keep_last)"


def locate_checkpoint(path: Path, hash_file: HashFile = sha256_of_file, weights: str | None = None) -> Path:
    """Return ``path`` if it is an undamaged checkpoint. For a run folder, return its newest undamaged checkpoint.

    Args:
        weights: ``training`` or ``ema`` to check only the files that a reader of these weights needs.

    Raises:
        CheckpointError: ``path`` is a damaged checkpoint, or contains no undamaged checkpoint.
    """
    if (path / MANIFEST_FILE).is_file():
        if problem := find_damage(path, hash_file, weights):
            raise CheckpointError(f"{problem}; give another checkpoint, or the run folder for its newest good one")
        return path
    folder = newest_good_checkpoint(path, hash_file, weights)
    if folder is None:
        raise no_checkpoint_error(path)
    return folder


def verify_checkpoints(path: Path, print_line: Callable[[str], None]) -> None:
    """Verify a checkpoint, or all checkpoints of a run, oldest first.

    Prints one line per checkpoint, and at the end the speed at which the files were read.

    Raises:
        CheckpointError: the path contains no checkpoint, or a checkpoint is damaged.
    """
    folders = [path] if is_checkpoint(path) else list_checkpoints(path)
    if not folders:
        raise no_checkpoint_error(path)
    started, hashed, damaged = time.perf_counter(), 0, 0
    for folder in folders:
        problem = find_damage(folder)
        if problem and folder_was_deleted(folder):
            print_line(f"deleted  {folder} while it was read, probably by its run (checkpoint.keep_last)")
            continue
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
