"""Download the checkpoint from which a run starts, if it is at a URL."""

import logging
from pathlib import Path

from data_tools.errors import DataError
from data_tools.storage.atomic import write_bytes_durably
from data_tools.storage.files import is_remote
from pipeline.checkpoint.download import DamagedAtUrlError, download_checkpoint
from pipeline.checkpoint.layout import step_of
from pipeline.checkpoint.mirror import is_paired, pair
from pipeline.checkpoint.remote_run import RemoteCheckpoint, RemoteRun
from pipeline.checkpoint.remote_search import complete_steps, find_checkpoints, open_undamaged
from pipeline.checkpoint.verification import newest_good_checkpoint
from pipeline.config.schema import Config
from pipeline.distributed.world import World
from pipeline.errors import CheckpointError
from pipeline.run_folder.layout import METRICS_FILE
from pipeline.training.resuming import AUTO

log = logging.getLogger(__name__)


def fetch_remote_start(config: Config, world: World) -> None:
    """If the run must start from a checkpoint at a URL, download this checkpoint into the run folder.

    With ``checkpoint.resume: auto``, this is the newest checkpoint at ``checkpoint.remote`` if it is newer than all
    checkpoints in the run folder. If ``checkpoint.resume`` is a URL, it is the checkpoint there, unless the run folder
    has checkpoints already. Damaged checkpoints are skipped with a warning. If the run folder has no metrics yet, they
    are downloaded too.

    This call is collective: every rank must make it.

    Raises:
        CheckpointError: the URL has no good checkpoint or belongs to another run, or a download failed.
        DataError: the server refuses or does not answer, and the run folder has no checkpoint.
    """
    run_folder = Path(config.run.out_dir)
    problem: DamagedAtUrlError | None = None
    for checkpoint in world.call_on_main(lambda: _find_candidates(config)):
        world.progress.reach(f"download of {checkpoint}", is_patient=True, repeats=False)
        try:
            download_checkpoint(checkpoint, run_folder, world)
        except DamagedAtUrlError as error:
            log.warning("skipping a damaged checkpoint: %s", error)
            problem = error
            continue
        world.call_on_main(lambda: _complete_run_folder(run_folder, checkpoint.run))  # noqa: B023 - called at once
        return
    if problem and is_remote(config.checkpoint.resume):
        raise problem


def _complete_run_folder(run_folder: Path, run: RemoteRun) -> None:
    pair(run_folder, run.url)
    if not (run_folder / METRICS_FILE).exists() and (content := run.read_metrics()) is not None:
        write_bytes_durably(run_folder / METRICS_FILE, content)


def _find_candidates(config: Config) -> list[RemoteCheckpoint]:
    """Return the checkpoints from which the run may start, the best first."""
    options, run_folder = config.checkpoint, Path(config.run.out_dir)
    if not is_remote(options.resume) and options.remote is None:
        return []
    own = newest_good_checkpoint(run_folder)
    if is_remote(options.resume):
        return [] if own else find_checkpoints(options.resume)
    assert options.remote is not None
    run = RemoteRun(options.remote)
    try:
        found = run.list()
    except DataError as error:
        if options.resume == AUTO and own is None:
            raise CheckpointError(
                f"checkpoint.remote: cannot look for checkpoints to continue from: {error}; repeat the command, or "
                "start a new run without checkpoint.remote"
            ) from None
        log.warning("checkpoint.remote: %s; the run starts without the checkpoints there", error)
        return []
    steps = complete_steps(found)
    if options.resume == AUTO and (own is None or is_paired(run_folder, run.url)):
        newest = -1 if own is None else step_of(own)
        return open_undamaged(run, found, [step for step in steps if step > newest])
    if steps and not is_paired(run_folder, run.url):
        raise CheckpointError(
            f"checkpoint.remote: {run.url} already holds checkpoints of another run; use another URL, or continue that "
            "run with --resume auto and a new run.out_dir"
        )
    return []
