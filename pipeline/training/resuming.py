"""Decide where a run starts: from scratch, or from which checkpoint."""

import logging
import shlex
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from data_tools.shards.manifest import TokenizerRecord
from data_tools.storage.atomic import write_json_durably
from data_tools.storage.files import is_remote
from data_tools.storage.sha256 import sha256_of_file
from pipeline.backends import Backend
from pipeline.checkpoint.hashing import HashFile
from pipeline.checkpoint.layout import checkpoint_folder, list_checkpoints, split_url
from pipeline.checkpoint.loading import finish_loading, read_training_state
from pipeline.checkpoint.manifest import read_manifest
from pipeline.checkpoint.pairing import abandon, is_paired
from pipeline.checkpoint.retention import remove_leftovers, set_aside_after
from pipeline.checkpoint.state import TrainingState, config_section
from pipeline.checkpoint.verification import (
    describe_deletion,
    folder_was_deleted,
    locate_checkpoint,
    newest_good_checkpoint,
)
from pipeline.config.changes import changed_settings
from pipeline.config.loading import dump_config
from pipeline.config.paths import is_same_place
from pipeline.config.schema import MODEL_SIZES, Config, ScheduleConfig
from pipeline.distributed.environment import launch_id, launcher_restarts
from pipeline.distributed.world import World
from pipeline.errors import CheckpointError, ConfigError
from pipeline.evaluation.results import set_aside_results
from pipeline.run_folder.layout import CHECKPOINTS_FOLDER, CONFIG_FILE
from pipeline.training.due_evaluation import with_recorded_evaluation
from pipeline.training.early_stop import early_stop_reason
from pipeline.training.initial_weights import compare_sizes, warn_of_other_tokenizer
from pipeline.training.schedule import lr_at
from pipeline.training.start import Start

log = logging.getLogger(__name__)

#: Keys that say how and where a run was started. They do not affect the training.
_KEYS_OF_A_START = {"checkpoint.resume", "run.working_dir"}

_BACKEND_OPTIONS = ("backend.ddp.", "backend.fsdp.", "backend.deepspeed.")

_NOTABLE_RISE = 1.1  # of the learning rate

AUTO, NONE = "auto", "none"  # values of checkpoint.resume; any other value is a path


def find_start(config: Config, data_sha256: str, hash_file: HashFile = sha256_of_file) -> Start | None:
    """Return the checkpoint from which to resume, or None to start from scratch. The function changes no file.

    The caller must hold the lock of the run folder.

    Raises:
        CheckpointError: the checkpoint cannot be used, all checkpoints are damaged, the run folder contains another
            run, or the data, seed or model has changed.
        ConfigError: the checkpoint belongs to another run, and a run that starts from it is already complete.
    """
    run_folder = Path(config.run.out_dir)
    with _errors_of_folder(run_folder):
        start = _locate_start(run_folder, config.checkpoint.resume, hash_file)
        if start is None:
            if list_checkpoints(run_folder):  # a start from scratch would delete the metrics of the run
                raise CheckpointError(
                    f"{run_folder}: all its checkpoints are damaged, see the lines above; to start again from scratch, "
                    f"use another run.out_dir, or delete {run_folder / CHECKPOINTS_FOLDER}"
                )
            return None
        _check_same_origin(config, start)
        _check_same_sizes(config, start)
        _check_same_run(config, data_sha256, start)
        if _is_of_another_run(start, config) and (reason := why_no_step_is_left(start.state, config.schedule)):
            raise ConfigError(f"{start}: {reason}, or name an earlier checkpoint with --at-step")
        return start


def tidy_run_folder(config: Config) -> None:
    """Delete the folders that interrupted saves and deletions have left. The caller must hold the lock of the folder.

    Raises:
        CheckpointError: a folder cannot be deleted.
    """
    run_folder = Path(config.run.out_dir)
    with _errors_of_folder(run_folder):
        remove_leftovers(run_folder)


def prepare_run_folder(start: Start | None, config: Config) -> None:
    """Prepare the folder of a run that continues from ``start``, or begins from scratch if ``start`` is None.

    Call this function after everything that can fail before the first step. The caller must hold the lock of the run
    folder.

    The function calls ``tidy_run_folder``, and writes ``config.json``. The next start must not use checkpoints that are
    later than ``start``. Therefore, the function renames later checkpoints in the run folder, and the results of later
    checkpoints in ``evaluation/``. For ``checkpoint.remote``, it records in the run folder that later checkpoints are
    abandoned.

    Raises:
        CheckpointError: a file or folder cannot be written, deleted or renamed.
    """
    tidy_run_folder(config)
    run_folder, step = Path(config.run.out_dir), start.state.step if start else 0
    with _errors_of_folder(run_folder):
        # What needs free space comes first, so that a full disk changes nothing.
        write_json_durably(run_folder / CONFIG_FILE, dump_config(config))
        if start and config.checkpoint.resume not in (AUTO, NONE):
            is_own = start.folder.resolve() == checkpoint_folder(run_folder, step).resolve()
            abandon(run_folder, step + 1 if is_own else step)
        if start:
            set_aside_after(run_folder, step, start.folder)
        set_aside_results(run_folder, step)


@contextmanager
def _errors_of_folder(run_folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"{run_folder}: cannot be prepared ({error})") from None


def _locate_start(run_folder: Path, resume: str, hash_file: HashFile) -> Start | None:
    if resume == AUTO:
        return _newest_own(run_folder, hash_file)
    if resume == NONE:
        own = _newest_own(run_folder, hash_file) if launcher_restarts() else None
        if own and own.state.launch_id == launch_id():
            log.info("the launcher has restarted this run: it continues from its own checkpoints")
            return own
        if list_checkpoints(run_folder):
            raise CheckpointError(
                f"{run_folder} already holds checkpoints of a run; use another run.out_dir, "
                "or continue the run with --resume auto"
            )
        return None
    if is_remote(resume):
        return _find_downloaded_start(run_folder, resume, hash_file)
    return _find_named_start(run_folder, Path(resume), hash_file)


def _newest_own(run_folder: Path, hash_file: HashFile) -> Start | None:
    own = newest_good_checkpoint(run_folder, hash_file)
    return Start.read(own) if own else None


def _find_downloaded_start(run_folder: Path, url: str, hash_file: HashFile) -> Start:
    own = _newest_own(run_folder, hash_file)
    if own is None or not is_paired(run_folder, split_url(url)[0]):
        raise CheckpointError(
            f"{run_folder} already holds checkpoints of another run than {url}; use another run.out_dir, "
            "or continue the run with --resume auto"
        )
    return own


def _find_named_start(run_folder: Path, named: Path, hash_file: HashFile) -> Start:
    """Return the named checkpoint. If this run has started from it before, return this run's newest checkpoint."""
    own = _newest_own(run_folder, hash_file)
    if own and _is_stored(str(named), "resume", own):
        log.info("this run has started from %s before: it continues from its own newest checkpoint", named)
        return own
    start = Start.read(locate_checkpoint(named, hash_file))
    if own and not start.folder.resolve().is_relative_to(run_folder.resolve()):
        raise CheckpointError(
            f"{run_folder} already holds checkpoints of another run than {named}; use another run.out_dir, "
            "or continue the run with --resume auto"
        )
    return start


def _is_of_another_run(start: Start, config: Config) -> bool:
    return not start.folder.resolve().is_relative_to(Path(config.run.out_dir).resolve())


def why_complete(start: Start, config: Config) -> str | None:
    """Return why the run is complete and how to train longer. If the run is not complete, return None.

    Args:
        start: the checkpoint from which the run would continue.
    """
    state = with_recorded_evaluation(start.state, Path(config.run.out_dir))
    return None if state.evaluation_is_due else why_no_step_is_left(state, config.schedule)


def why_no_step_is_left(state: TrainingState, schedule: ScheduleConfig) -> str | None:
    """Return why there is no step to train, and how to train longer. If there is a step, return None."""
    if state.step >= schedule.max_steps:
        return (
            f"at step {state.step} of schedule.max_steps {schedule.max_steps}, nothing to train; raise "
            "schedule.max_steps to train longer"
        )
    if reason := early_stop_reason(schedule, state.validation):
        return f"at step {state.step}, nothing to train: {reason}; set this key to null to train longer"
    return None


def describe_raised_rate(start: Start, config: Config) -> str | None:
    """Return a warning if a resumed run has another schedule than before, and this raises its decayed learning rate."""
    stored = config_section(start.state.config, "schedule")
    if stored == dump_config(config)["schedule"] or _is_of_another_run(start, config):
        return None
    try:
        schedule = ScheduleConfig.model_validate(stored)
    except ValidationError:
        return None  # an earlier version wrote the checkpoint, with other keys
    step = start.state.step
    before, after = (lr_at(step, config.optimizer, each) for each in (schedule, config.schedule))
    if step <= schedule.decay_start or after <= _NOTABLE_RISE * before:
        return None
    return (
        f"step {step:,} is inside or after the decay of the earlier schedule, and the changed schedule raises the "
        f"learning rate there from {before:.3g} to {after:.3g}; the loss can rise, too"
    )


def describe_started_decay(start: Start, config: Config) -> str | None:
    """Return a warning if a new run starts from another run's checkpoint, at a step inside the new run's decay.

    In this case, the learning rate usually jumps. With the same schedule and the same peak learning rate in both runs,
    it does not jump, and the result is None.

    Args:
        start: the checkpoint from which the new run continues.
    """
    state, schedule, now = start.state, config.schedule, dump_config(config)
    keeps_rates = config_section(state.config, "schedule") == now["schedule"] and (
        start.setting("optimizer", "learning_rate") == now["optimizer"]["learning_rate"]
    )
    if keeps_rates or state.step <= schedule.decay_start or not _is_of_another_run(start, config):
        return None
    return (
        f"this branch begins at step {state.step:,}, inside the decay of its schedule (steps {schedule.decay_start:,} "
        f"to {schedule.max_steps:,}): its learning rate begins at {lr_at(state.step, config.optimizer, schedule):.3g}, "
        f"and the peak is {config.optimizer.learning_rate:.3g}; for a decay that begins at step {state.step:,}, set "
        f"schedule.name=wsd schedule.decay_steps={schedule.max_steps - state.step}"
    )


def _check_same_sizes(config: Config, start: Start) -> None:
    stored = config_section(start.state.config, "model")
    differing = [key for key in MODEL_SIZES if key in stored and stored[key] != getattr(config.model, key)]
    if differing:
        there, here, cure = compare_sizes(differing, stored, config.model)
        raise CheckpointError(
            f"{start}: its model has {there}, and this run's model has {here}; add --set {cure}, or start a new run "
            "in another run.out_dir"
        )


def _check_same_origin(config: Config, start: Start) -> None:
    given = config.checkpoint.init_from
    if given is None or _is_stored(given, "init_from", start):
        return
    stored = start.setting("checkpoint", "init_from")
    raise CheckpointError(
        f"{start}: belongs to a run that started from {stored or 'random weights'}, and checkpoint.init_from is "
        f"{given}; use another run.out_dir to start from these weights, or leave init_from out to continue"
    )


def _is_stored(given: str, key: str, start: Start) -> bool:
    """Return whether a path or URL of the command is that of a key of the section ``checkpoint`` in a stored config."""
    stored = start.setting("checkpoint", key)
    return isinstance(stored, str) and is_same_place(given, stored, start.setting("run", "working_dir"))


def _check_same_run(config: Config, data_sha256: str, start: Start) -> None:
    """Raise CheckpointError if the model has changed.

    If the checkpoint was trained on samples, also raise it if the data or their order has changed.
    """
    state, reset_at = start.state, start.setting("model", "reset_positions_at")
    settings: list[tuple[str, Any, Any, str]] = [
        ("model.reset_positions_at", reset_at, config.model.reset_positions_at, "model")
    ]
    if state.samples:
        seq_len = start.setting("data", "seq_len") or start.setting("model", "context_length")
        settings += [
            ("run.seed", state.seed, config.run.seed, "order of the data"),
            ("data.seq_len", seq_len, config.seq_len, "order of the data"),
        ]
    for key, stored, now, changed in settings:
        if stored != now:
            stored, now = ("null" if value is None else value for value in (stored, now))
            raise CheckpointError(
                f"{start}: was trained with {key} {stored}, now it is {now}: the {changed} would change; "
                f"set {key} to {stored}, or {_start_from(start.folder)}"
            )
    if state.samples and state.data_sha256 not in (None, data_sha256):
        key, change = "data.path", f"{config.data.path} now holds (its manifest has changed)"
        if config.data.mixture is not None:
            key, change = "data.mixture", "data.mixture now has (a manifest, a weight or their order has changed)"
        raise CheckpointError(
            f"{start}: was trained on other data than {change}; "
            f"set {key} to the data it was trained on, or {_start_from(start.folder)}"
        )


def _start_from(folder: Path) -> str:
    return f"start a new run from its weights with --init-from {shlex.quote(str(folder))} and another run.out_dir"


def describe_changes(start: Start, config: Config) -> list[str]:
    """Return one text per config key that has changed since the checkpoint ``start`` was saved.

    A text is, for example, ``optimizer.learning_rate 0.001 -> 0.0001``. If the backend has changed, the options of the
    two backends are left out.
    """
    changes = changed_settings(start.state.config, dump_config(config))
    ignored = _BACKEND_OPTIONS if "backend.name" in changes else ()
    return [
        f"{key} {change}"
        for key, change in changes.items()
        if key not in _KEYS_OF_A_START and not key.startswith(ignored)
    ]


def windows_per_evaluation(config: dict[str, Any]) -> int | None:
    """Return how many windows of a large validation split an evaluation reads, or None for all windows.

    Args:
        config: a resolved config, such as that of a checkpoint.
    """
    batches = config_section(config, "evaluation").get("max_batches")
    size = config_section(config, "batch").get("micro_batch_size")
    return batches * size if isinstance(batches, int) and isinstance(size, int) else None


def load_start(
    start: Start | None,
    config: Config,
    data_sha256: str,
    tokenizer: TokenizerRecord,
    backend: Backend,
    world: World,
) -> TrainingState:
    """Return the training state from which the run starts. If ``start`` is a checkpoint, load it into the backend.

    Every rank must call this.
    """
    if start is None:
        state = TrainingState(0, 0, 0, 0, *backend.loss_scaler.state, config.run.seed)
    else:
        state = load_checkpoint(start.folder, backend, world)
        warn_of_other_tokenizer(start.folder, state.tokenizer, tokenizer)
    return replace(state, seed=config.run.seed, data_sha256=data_sha256, tokenizer=tokenizer)


def load_checkpoint(folder: Path, backend: Backend, world: World) -> TrainingState:
    """Load a checkpoint into the backend, and return its training state. Every rank must call this.

    Raises UserError on all ranks if one of them cannot read the checkpoint.
    """
    started = time.perf_counter()
    state = world.call_on_each(lambda: _read_checkpoint(folder, backend, world))
    finish_loading(backend, state)
    seconds, size = time.perf_counter() - started, read_manifest(folder).tensor_bytes
    log.info("loaded %s in %.2f s, %s MB/s", folder, seconds, f"{size / seconds / 1e6:,.0f}")
    return state


def _read_checkpoint(folder: Path, backend: Backend, world: World) -> TrainingState:
    try:
        return read_training_state(folder, backend, world.rank if world.size > 1 else None)
    except CheckpointError:
        if folder_was_deleted(folder):
            raise CheckpointError(
                f"{describe_deletion(folder)}; repeat the command with a checkpoint that the run keeps, or with its "
                "run folder for the newest one"
            ) from None
        raise
