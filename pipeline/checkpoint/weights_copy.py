"""Copy the weights of a checkpoint at a URL to this machine, for commands that only read the weights."""

import hashlib
import logging
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from data_tools.errors import DataError
from data_tools.formatting import format_size
from data_tools.storage.atomic import atomic_folder, write_bytes_durably, write_json_durably
from data_tools.storage.files import is_remote
from data_tools.storage.locks import waiting_for_lock
from pipeline.checkpoint.download import REQUESTS, allocate, blocks_of, download_block
from pipeline.checkpoint.json_files import read_json_object
from pipeline.checkpoint.layout import (
    MANIFEST_FILE,
    checkpoint_folder,
    list_checkpoints,
    no_checkpoint_error,
)
from pipeline.checkpoint.manifest import CheckpointManifest
from pipeline.checkpoint.pieces import manifest_of_weights
from pipeline.checkpoint.remote_run import RemoteCheckpoint, parse_url
from pipeline.checkpoint.remote_search import complete_steps, find_checkpoints
from pipeline.checkpoint.retention import delete_checkpoint
from pipeline.checkpoint.verification import find_damage, folder_was_deleted, locate_checkpoint, log_deletion
from pipeline.distributed.environment import cache_folder
from pipeline.errors import CheckpointError
from pipeline.model.parameter_state import EMA
from pipeline.run_folder.layout import METRICS_FILE

log = logging.getLogger(__name__)

_LOCK_FILE = "copy.lock"


def locate_weights_of(place: Path | str, weights: str = "training") -> Path:
    """Return a checkpoint folder on this machine with undamaged weights, for commands that only read the weights.

    The optimizer's files are not read, unless they contain the requested weights.

    If ``place`` is a URL and this machine has no copy of the weights, the weights are downloaded. Only the newest copy
    per URL is kept.

    Args:
        place: the path or URL of a checkpoint folder or a run folder.
        weights: ``training`` for the trained weights, or ``ema`` for their moving average.

    Raises:
        CheckpointError: there is no checkpoint with undamaged weights.
        DataError: the server refuses or does not answer, or the weights cannot be written to this machine.
    """
    if not is_remote(str(place)):
        return locate_checkpoint(Path(place), weights=weights)
    for checkpoint in find_checkpoints(str(place)):
        run_folder = cache_folder() / "runs" / hashlib.sha256(checkpoint.run.url.encode()).hexdigest()[:16]
        try:
            run_folder.mkdir(parents=True, exist_ok=True)
            with waiting_for_lock(run_folder / _LOCK_FILE):
                folder, problem = _copy(checkpoint, run_folder)
        except CheckpointError:
            if not was_deleted(str(checkpoint)):
                raise
            log_deletion(str(checkpoint))
            return locate_weights_of(place, weights)
        except OSError as error:
            raise DataError(
                f"cannot copy {checkpoint} to {run_folder}: {error.strerror or error}; free space there, or set "
                "XDG_CACHE_HOME to a folder with space for the weights"
            ) from None
        if problem:
            log.warning("skipping a damaged checkpoint: %s", problem.replace(str(folder), str(checkpoint)))
        else:
            return folder
    raise no_checkpoint_error(place)


def was_deleted(checkpoint: Path | str) -> bool:
    """Return whether a checkpoint no longer exists. ``checkpoint`` is its folder or its URL.

    Raises DataError if a server refuses or does not answer.
    """
    if not is_remote(str(checkpoint)):
        return folder_was_deleted(Path(checkpoint))
    run, step = parse_url(str(checkpoint))
    return step not in complete_steps(run.list())


def _copy(checkpoint: RemoteCheckpoint, run_folder: Path) -> tuple[Path, str | None]:
    """If the run folder has no undamaged copy of the weights, copy them and delete all other copies.

    Returns the folder of the copy, and a description of its damage or None.
    """
    folder = checkpoint_folder(run_folder, checkpoint.step)
    manifest = _without_optimizer(checkpoint.manifest)
    has_copy = (folder / MANIFEST_FILE).is_file() and read_json_object(folder / MANIFEST_FILE) == manifest.to_json()
    if has_copy and find_damage(folder) is None:
        return folder, None
    for other in list_checkpoints(run_folder):
        delete_checkpoint(other)
    started, files = time.perf_counter(), manifest.files
    with atomic_folder(folder) as aside:
        allocate(files, aside)
        with ThreadPoolExecutor(REQUESTS) as threads:
            size = sum(threads.map(partial(download_block, checkpoint, aside), blocks_of(files)))
        write_json_durably(aside / MANIFEST_FILE, manifest.to_json())
    if (metrics := checkpoint.run.read_metrics()) is not None:
        write_bytes_durably(run_folder / METRICS_FILE, metrics)
    log.info("copied %s to %s: %s in %.2f s", checkpoint, folder, format_size(size), time.perf_counter() - started)
    return folder, find_damage(folder)


def _without_optimizer(manifest: CheckpointManifest) -> CheckpointManifest:
    """Return the manifest without the optimizer's state.

    If there is a moving average of the weights, keep all files, because the average is in the optimizer's files.
    """
    has_average = any(EMA in kinds for kinds in manifest.optimizer_state.values())
    return manifest_of_weights(manifest, "ema" if has_average else "training")
