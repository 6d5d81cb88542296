"""Find undamaged checkpoints at a URL."""

import logging
from collections.abc import Iterable, Mapping

from pipeline.checkpoint.layout import MANIFEST_FILE, no_checkpoint_error
from pipeline.checkpoint.remote_run import RemoteCheckpoint, RemoteRun, parse_url
from pipeline.errors import CheckpointError

log = logging.getLogger(__name__)


def find_checkpoints(url: str) -> list[RemoteCheckpoint]:
    """Return the undamaged checkpoints at a URL, newest first. The URL names a run or one checkpoint.

    The function does not compute hashes, so it does not find all damage.

    Raises:
        CheckpointError: the URL has no undamaged checkpoint.
        DataError: the server refuses or does not answer.
    """
    run, step = parse_url(url)
    found = run.list()
    checkpoints = open_undamaged(run, found, [each for each in complete_steps(found) if step in (None, each)])
    if not checkpoints:
        raise no_checkpoint_error(url)
    return checkpoints


def complete_steps(found: Mapping[int, Mapping[str, int]]) -> list[int]:
    """Return the steps of the complete checkpoints, newest first. ``found`` is the result of ``RemoteRun.list``."""
    return sorted((step for step, files in found.items() if MANIFEST_FILE in files), reverse=True)


def open_undamaged(
    run: RemoteRun, found: Mapping[int, Mapping[str, int]], steps: Iterable[int]
) -> list[RemoteCheckpoint]:
    """Open the checkpoints of ``steps``. Log and leave out checkpoints with a bad manifest or wrong file sizes.

    ``found`` is the result of ``RemoteRun.list``.
    """
    checkpoints = []
    for step in steps:
        try:
            checkpoint = run.open(step, found[step])
            problem = checkpoint.find_size_damage()
        except CheckpointError as error:
            problem = str(error)
        if problem is None:
            checkpoints.append(checkpoint)
        else:
            log.warning("skipping a damaged checkpoint: %s", problem)
    return checkpoints
