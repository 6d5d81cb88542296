"""Check that all ranks run the same program with the same config, and see the same run folder and the same data."""

import socket
import time
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.checkpoint.saving import package_versions
from pipeline.config.changes import changed_settings
from pipeline.config.loading import dump_config
from pipeline.config.schema import Config
from pipeline.distributed.world import World
from pipeline.errors import ConfigError
from pipeline.training.provenance import PROGRAM_ROOT, hash_source_code

_TOKEN_PREFIX = ".shared-"
#: A network file system may show a new file on other hosts only after some seconds.
_VISIBLE_WITHIN_S = 10.0
_POLL_S = 0.1
#: Paths may differ between hosts. The run folder and the data are compared by their contents.
_MAY_DIFFER = {
    "run": ("out_dir", "working_dir"),
    "data": ("path", "mixture"),
    "checkpoint": ("resume", "init_from"),
    "evaluation": ("data",),
}
_NAMED_CHANGES = 4


@dataclass(frozen=True)
class RankFacts:
    """How one rank was started."""

    rank: int
    host: str
    folder: str  # the run folder, absolute
    data_sha256: str
    config: dict[str, Any]
    program: dict[str, Any]  # versions of packages, and on the first rank of a host a hash of the source code


def check_agreement(config: Config, data_sha256: str, world: World) -> None:
    """Raise ConfigError if a rank runs another program than rank 0, or has another config, run folder or other data.

    Every rank must call this.
    """
    if world.size == 1:
        return
    folder = Path(config.run.out_dir)
    own = describe_rank(config, data_sha256, world)
    token = world.call_on_main(lambda: _write_token(folder))
    main: RankFacts = world.broadcast(own)
    problem = find_difference(main, own)
    if problem is None and token and not _is_visible(folder / token):
        problem = (
            f"run.out_dir: {own.folder} of rank {own.rank} on {own.host} and {main.folder} of rank 0 on {main.host} "
            "are different folders; use the absolute path of a folder that all hosts share, such as one on NFS or "
            "Lustre"
        )
    problems = [text for text in world.gather(problem) if text]
    if world.is_main and token:
        (folder / token).unlink(missing_ok=True)
    if problems:
        raise ConfigError(problems[0])


def describe_rank(config: Config, data_sha256: str, world: World) -> RankFacts:
    """Return how this rank was started. Paths in the config that may differ between hosts are left out."""
    compared = dump_config(config)
    for section, keys in _MAY_DIFFER.items():
        for key in keys:
            del compared[section][key]
    program = {name: text for name, text in package_versions().items() if name in ("torch", "deepspeed")}
    if world.local_rank == 0:
        program["source code"] = hash_source_code(PROGRAM_ROOT)[:12]
    folder = str(Path(config.run.out_dir).absolute())
    return RankFacts(world.rank, socket.gethostname(), folder, data_sha256, compared, program)


def find_difference(main: RankFacts, own: RankFacts) -> str | None:
    """Return a message about a difference from rank 0, or None. The run folders are not compared.

    Args:
        main: how rank 0 was started.
    """
    who = f"rank {own.rank} on {own.host}"
    if changes := _describe_changes(main.program, own.program):
        return (
            f"{who} runs another program than rank 0 on {main.host}: {changes}; install the same packages and the same "
            "checkout on all hosts"
        )
    if changes := _describe_changes(main.config, own.config):
        return (
            f"{who} has another config than rank 0 on {main.host}: {changes}; start the same command with the same "
            "config files on all hosts"
        )
    if own.data_sha256 != main.data_sha256:
        return (
            f"data.path: {who} sees other data (manifest {own.data_sha256[:12]}) than rank 0 on {main.host} (manifest "
            f"{main.data_sha256[:12]}); use a shared folder, or copy the same data to all hosts"
        )
    return None


def _describe_changes(main: dict[str, Any], own: dict[str, Any]) -> str:
    texts = [f"{key} {change}" for key, change in changed_settings(main, own).items()]
    more = len(texts) - _NAMED_CHANGES
    return ", ".join(texts[:_NAMED_CHANGES]) + (f" and {more} more" if more > 0 else "")


def _write_token(run_folder: Path) -> str | None:
    """Create a file in the run folder, and return its name. If the disk is full, return None.

    Files that a killed start has left are deleted.
    """
    token = _TOKEN_PREFIX + uuid.uuid4().hex
    try:
        for left in run_folder.glob(f"{_TOKEN_PREFIX}*"):
            left.unlink(missing_ok=True)
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
