"""Check that the ranks on all hosts see the same run folder and the same data."""

import socket
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.distributed.world import World
from pipeline.errors import ConfigError

_TOKEN_PREFIX = ".shared-"
#: A network file system may show a new file on other hosts only after some seconds.
_VISIBLE_WITHIN_S = 10.0
_POLL_S = 0.1


@dataclass(frozen=True)
class View:
    """What one rank sees: its run folder, the hash of the training data, and whether the folder has rank 0's file.

    Rank 0 writes this file into its run folder, to test whether all ranks see the same folder.
    """

    host: str
    folder: str  # absolute
    has_token: bool
    data_sha256: str


def check_shared_folders(run_folder: Path, data_sha256: str, world: World) -> None:
    """Raise ConfigError if a rank sees another run folder or other data than rank 0.

    Every rank must call this.
    """
    if world.size == 1:
        return
    token = world.call_on_main(lambda: _write_token(run_folder))
    if token is None:  # the disk is full
        return
    view = View(socket.gethostname(), str(run_folder.absolute()), _is_visible(run_folder / token), data_sha256)
    views = world.gather(view)
    if world.is_main:
        (run_folder / token).unlink(missing_ok=True)
    if problem := find_difference(views):
        raise ConfigError(problem)


def find_difference(views: Sequence[View]) -> str | None:
    """Return a message about the first rank whose run folder or data differ from those of rank 0, or None."""
    main = views[0]
    for rank, view in enumerate(views):
        if not view.has_token:
            return (
                f"run.out_dir: {view.folder} of rank {rank} on {view.host} and {main.folder} of rank 0 on "
                f"{main.host} are different folders; use the absolute path of a folder that all hosts share, such as "
                "one on NFS or Lustre"
            )
        if view.data_sha256 != main.data_sha256:
            return (
                f"data.path: rank {rank} on {view.host} sees other data (manifest {view.data_sha256[:12]}) than rank 0 "
                f"on {main.host} (manifest {main.data_sha256[:12]}); use a shared folder, or copy the same data to all "
                "hosts"
            )
    return None


def _write_token(run_folder: Path) -> str | None:
    token = _TOKEN_PREFIX + uuid.uuid4().hex
    try:
        (run_folder / token).touch()
    except OSError:
        return None
    return token


def _is_visible(path: Path) -> bool:
    deadline = time.monotonic() + _VISIBLE_WITHIN_S
    while not path.exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(_POLL_S)
    return True
