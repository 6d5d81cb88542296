"""Where a run starts: from scratch, from its own newest good checkpoint, or from one that was named."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

from pipeline.checkpoint import (
    config_section,
    list_checkpoints,
    locate_checkpoint,
    newest_good_checkpoint,
    read_state,
    read_state_file,
    remove_leftovers,
    set_aside_after,
)
from pipeline.config.schema import Config
from pipeline.distributed.environment import launch_id, launcher_restarts
from pipeline.errors import CheckpointError, ConfigError

log = logging.getLogger(__name__)

AUTO, NONE = "auto", "none"


def make_run_folder(folder: Path) -> None:
    """Make the folder of a run; the caller takes its lock next.

    Raises:
        ConfigError: it cannot be made, or not be written into.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"run.out_dir: cannot make {folder} ({error.strerror}); name a folder to write into"
        ) from None
    if not os.access(folder, os.W_OK):
        raise ConfigError(f"run.out_dir: {folder} cannot be written; name a folder to write into")


def choose_start(config: Config, data_sha256: str) -> Path | None:
    """What to continue from; None: from scratch. The caller holds the run folder's lock.

    Leftovers of crashed saves are removed, and checkpoints later than the one that is continued are set
    aside: otherwise the next start would take them for newer ones of this run.

    Raises:
        CheckpointError: what was named cannot be used, belongs to another order of the data, or the folder
            holds another run.
    """
    run_folder = Path(config.run.out_dir)
    try:
        return _choose(config, data_sha256, run_folder)
    except OSError as error:
        raise CheckpointError(f"{run_folder}: cannot be prepared ({error})") from None


def _choose(config: Config, data_sha256: str, run_folder: Path) -> Path | None:
    remove_leftovers(run_folder)
    start = _find_start(run_folder, config.checkpoint.resume)
    if start is None:
        set_aside_after(run_folder, -1)  # damaged ones only: else there would be a start
        return None
    _expect_same_order(config, data_sha256, start)
    _expect_same_positions(config, start)
    state, _ = read_state(start)
    if state.step < config.schedule.max_steps:
        set_aside_after(run_folder, state.step, start)
    return start


def _find_start(run_folder: Path, resume: str) -> Path | None:
    if resume == AUTO:
        return newest_good_checkpoint(run_folder)
    if resume == NONE:
        own = newest_good_checkpoint(run_folder) if launcher_restarts() else None
        if own and read_state_file(own).launch_id == launch_id():
            log.info("the launcher has started this run anew: it continues its own checkpoints")
            return own
        if list_checkpoints(run_folder):
            raise CheckpointError(
                f"{run_folder} already holds checkpoints of a run; give another run.out_dir, "
                "or continue it with --resume auto"
            )
        return None
    return _find_named_start(run_folder, Path(resume))


def _find_named_start(run_folder: Path, named: Path) -> Path:
    """A named checkpoint, or what this run has made of it before: the same command continues after a crash."""
    own = newest_good_checkpoint(run_folder)
    if own and _stored(own, "checkpoint").get("resume") == str(named):
        log.info("this run began from %s before: it continues its own newest checkpoint", named)
        return own
    start = locate_checkpoint(named)
    if own and not start.resolve().is_relative_to(run_folder.resolve()):
        raise CheckpointError(
            f"{run_folder} already holds checkpoints of another run than {named}; give another run.out_dir, "
            "or continue it with --resume auto"
        )
    return start


def _expect_same_order(config: Config, data_sha256: str, folder: Path) -> None:
    """The samples consumed so far mean the same only under the same seed, sample length and data."""
    state, _ = read_state(folder)
    if not state.samples:
        return
    stored_length = _stored(folder, "data").get("seq_len") or _stored(folder, "model").get("context_length")
    for key, before, now in (
        ("run.seed", state.seed, config.run.seed),
        ("data.seq_len", stored_length, config.seq_len),
    ):
        if before != now:
            raise CheckpointError(
                f"{folder}: was trained with {key} {before}, now it is {now}: the order of the data would change; "
                f"set {key} to {before}, or another run.out_dir"
            )
    if state.data_sha256 not in (None, data_sha256):
        data_key, now_is = "data.path", f"{config.data.path} holds now (its manifest has changed)"
        if config.data.mixture is not None:
            data_key, now_is = "data.mixture", "data.mixture is now (a manifest, a weight or their order has changed)"
        raise CheckpointError(
            f"{folder}: was trained on other data than {now_is}; "
            f"set {data_key} to the data it was trained on, or another run.out_dir"
        )


def _expect_same_positions(config: Config, folder: Path) -> None:
    before, now = (
        "null" if token is None else token
        for token in (_stored(folder, "model").get("reset_positions_at"), config.model.reset_positions_at)
    )
    if before != now:
        raise CheckpointError(
            f"{folder}: was trained with model.reset_positions_at {before}, now it is {now}: that is another model; "
            f"set model.reset_positions_at to {before}, or another run.out_dir"
        )


def _stored(folder: Path, section: str) -> dict[str, Any]:
    """A section of the config that a checkpoint was saved with."""
    return config_section(read_state(folder)[1], section)
