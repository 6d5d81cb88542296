"""Download the checkpoint from which a run starts, if it is at a URL."""

import logging
from collections.abc import Iterable, Iterator
from pathlib import Path

from data_tools.errors import DataError
from data_tools.storage.files import is_remote
from pipeline.checkpoint.download import DamagedAtUrlError, download_checkpoint
from pipeline.checkpoint.layout import split_url, step_of
from pipeline.checkpoint.pairing import is_abandoned, is_paired
from pipeline.checkpoint.remote_run import RemoteCheckpoint, RemoteRun
from pipeline.checkpoint.remote_search import complete_steps, find_checkpoints, open_undamaged
from pipeline.checkpoint.verification import newest_good_checkpoint
from pipeline.config.schema import CheckpointConfig, Config
from pipeline.distributed.world import World
from pipeline.errors import CheckpointError
from pipeline.training.resuming import AUTO

log = logging.getLogger(__name__)


def fetch_remote_start(config: Config, world: World) -> None:
    """If the run starts from a checkpoint at a URL, download this checkpoint into the run folder.

    - ``checkpoint.resume`` is ``auto``: download the newest checkpoint at ``checkpoint.remote`` if it is newer than all
      undamaged checkpoints in the run folder.
    - ``checkpoint.resume`` is a URL: download the checkpoint at this URL if the run folder has no undamaged checkpoint.

    Damaged checkpoints at the URL are skipped with a warning. Every rank must call this.

    Raises:
        CheckpointError: ``checkpoint.remote`` belongs to another run. Or the run folder has no undamaged checkpoint,
            and those at the URL cannot be used.
        DataError: the server of ``checkpoint.resume`` fails, and the run folder has no undamaged checkpoint.
    """
    run_folder = Path(config.run.out_dir)
    candidates, is_needed = world.call_on_main(lambda: _find_candidates(config.checkpoint, run_folder))
    for checkpoint in candidates:
        world.progress.reach(f"download of {checkpoint}", is_patient=True, repeats=False)
        try:
            download_checkpoint(checkpoint, run_folder, world)
            return
        except DamagedAtUrlError as error:
            log.warning("skipping a damaged checkpoint: %s", error)
        except CheckpointError as error:
            if is_needed:
                raise
            log.warning("%s; the run starts from its own newest checkpoint", error)
            return
    if candidates and is_needed:
        raise _unusable_error(candidates[0].run.url)


def _find_candidates(options: CheckpointConfig, run_folder: Path) -> tuple[list[RemoteCheckpoint], bool]:
    """Return the checkpoints from which the run may start, best first, and whether the run needs one of them."""
    if not is_remote(options.resume) and options.remote is None:
        return [], False
    own = newest_good_checkpoint(run_folder)
    newer = [] if options.remote is None else _find_newer(options.remote, options.resume, run_folder, own)
    if is_remote(options.resume) and own is None:
        return find_checkpoints(options.resume), True
    return newer, own is None


def _find_newer(url: str, resume: str, run_folder: Path, own: Path | None) -> list[RemoteCheckpoint]:
    """Return the checkpoints at ``checkpoint.remote`` that are newer than ``own``, the newest first.

    Returns an empty list if ``resume`` is not ``auto``.

    Raises:
        CheckpointError: the URL belongs to another run, or the run needs a checkpoint from the URL and cannot get one.
    """
    run = RemoteRun(url)
    is_own = own is not None and is_paired(run_folder, run.url)
    try:
        found = run.list()
        steps = complete_steps(found)
        if resume == AUTO and (own is None or is_own):
            newest = -1 if own is None else step_of(own)
            newer = open_undamaged(run, found, _without_abandoned(run_folder, run, (s for s in steps if s > newest)))
            if steps and own is None and not newer:
                raise _unusable_error(run.url)
            return newer
    except DataError as error:
        if resume == AUTO and own is None:
            raise CheckpointError(
                f"checkpoint.remote: cannot look for checkpoints to continue from: {error}; repeat the command, or "
                "start a new run without checkpoint.remote"
            ) from None
        log.warning("checkpoint.remote: %s; the run starts without the checkpoints there", error)
        return []
    if steps and not is_own and split_url(resume)[0] != run.url:
        raise CheckpointError(
            f"checkpoint.remote: {run.url} already holds checkpoints of another run; use another URL, or continue that "
            "run with --resume auto and a new run.out_dir"
        )
    return []


def _without_abandoned(run_folder: Path, run: RemoteRun, steps: Iterable[int]) -> Iterator[int]:
    """Yield the steps from which the run may continue. Log a warning for each other step."""
    for step in steps:
        if is_abandoned(run_folder, run.url, step):
            log.warning("ignored %s: the run has continued from an earlier step", run.checkpoint_url(step))
        else:
            yield step


def _unusable_error(url: str) -> CheckpointError:
    return CheckpointError(
        f"{url}: this program can use none of the checkpoints there, and the run folder has no good checkpoint (the "
        "warnings above say why); to start a new run, leave out --resume and set checkpoint.remote to another URL"
    )
