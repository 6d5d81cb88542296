"""Upload the checkpoints of a run to ``checkpoint.remote``, and require that the last one arrives."""

import logging
from pathlib import Path

from data_tools.formatting import format_size
from pipeline.checkpoint.layout import list_checkpoints
from pipeline.checkpoint.mirror import Mirror, UploadOutcome
from pipeline.config.schema import Config
from pipeline.distributed.world import World
from pipeline.errors import CheckpointError

log = logging.getLogger(__name__)


def create_mirror(config: Config, world: World) -> Mirror | None:
    """Return a mirror that uploads checkpoints to ``checkpoint.remote``, or None. It is not started."""
    options = config.checkpoint
    if options.remote is None:
        return None
    folder = Path(config.run.out_dir)
    return Mirror(options.remote, folder, world, keep_last=options.keep_last, timeout_s=options.remote_timeout_s)


def start_uploads(mirror: Mirror) -> None:
    """Start a mirror. If the run has gone back, it sets later checkpoints at the URL aside at once."""
    mirror.start()
    mirror.request()


def upload_missing(config: Config, world: World) -> None:
    """Upload the checkpoints of a complete run that the URL lacks. Every rank must call this.

    Raises:
        CheckpointError: the last checkpoint could not be uploaded.
    """
    mirror = create_mirror(config, world)
    if mirror:
        start_uploads(mirror)
        world.progress.reach("the upload of the last checkpoint", is_patient=True, repeats=False)
        for outcome in mirror.finish(world.progress.move):
            log_upload(mirror.url, outcome, "the next start tries again")
    require_uploaded(mirror, world)


def require_uploaded(mirror: Mirror | None, world: World) -> None:
    """Raise CheckpointError on all ranks if the last checkpoint is not at the URL. Every rank must call this.

    Call this function after ``Mirror.finish``.
    """

    def require() -> None:
        if mirror and (problem := mirror.why_missing()):
            raise CheckpointError(
                f"the last checkpoint is not at {mirror.url}: {problem}; it is in "
                f"{list_checkpoints(mirror.run_folder)[-1]}; run the same command again to upload it"
            )

    world.call_on_main(require)


def log_upload(url: str, outcome: UploadOutcome, then: str) -> None:
    """Log the outcome of an upload, or of another action at the URL.

    Args:
        then: what happens after a failure.
    """
    if outcome.problem is None:
        size = format_size(outcome.bytes)
        log.info("uploaded step %d to %s: %s in %.2f s", outcome.step, url, size, outcome.seconds)
        return
    log.warning("cannot %s %s: %s; %s", outcome.action, url, outcome.problem, then)
