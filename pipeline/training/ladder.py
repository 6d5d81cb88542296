"""Find the existing runs of a ladder, and compare their settings with those of the command.

A ladder is one long run at a constant learning rate, and several branches. Each branch starts from a step of the long
run, which is called a *milestone*. In a branch, the learning rate decays.
"""

from collections.abc import Sequence
from contextlib import suppress
from itertools import count
from pathlib import Path

from pipeline.checkpoint.layout import checkpoint_folder, list_checkpoints, step_of
from pipeline.checkpoint.state import read_state, read_state_file
from pipeline.config.changes import changed_settings
from pipeline.config.loading import dump_config
from pipeline.config.schema import Config
from pipeline.errors import CheckpointError, ConfigError
from pipeline.training.due_evaluation import with_recorded_evaluation

#: The sections and keys that determine the weights and the losses of a run.
_OF_NUMBERS = (
    "run.seed",
    "run.precision",
    "model.",
    "data.",
    "batch.tokens_per_step",
    "optimizer.",
    "averaging.",
    "schedule.",
    "checkpoint.init_from",
    "guard.",
    "backend.reduce_dtype",
    "evaluation.max_batches",
)
_NOT_OF_NUMBERS = ("model.activation_checkpointing", "data.verify")
#: Keys of the decay. The long run uses only ``schedule.max_steps``, which grows with new milestones.
_OF_DECAY = ("schedule.max_steps", "schedule.decay_steps", "schedule.decay_shape", "schedule.min_lr_ratio")


def has_step(run_folder: Path, step: int) -> bool:
    """Return whether a run has a checkpoint of the given step or of a later step.

    A checkpoint whose evaluation was stopped, and not repeated yet, does not count.
    """
    folders = [folder for folder in list_checkpoints(run_folder) if step_of(folder) >= step]
    return any(not _lacks_evaluation(folder, run_folder) for folder in folders)


def _lacks_evaluation(folder: Path, run_folder: Path) -> bool:
    with suppress(CheckpointError):
        return with_recorded_evaluation(read_state(folder)[0], run_folder).evaluation_is_due
    return False


def check_long_run(run_folder: Path, config: Config) -> None:
    """Raise ConfigError if the ladder's long run already exists, and its settings differ from ``config``."""
    changes = [change for key, change in _changes(run_folder, config).items() if key not in _OF_DECAY]
    if changes:
        raise ConfigError(
            f"{run_folder}: was trained with other settings ({', '.join(changes)}); name another folder with --out, or "
            "give the settings of this run"
        )


def check_milestones(run_folder: Path, milestones: Sequence[int]) -> None:
    """Raise ConfigError if the run has passed a milestone and has no checkpoint of this step."""
    steps = [step_of(folder) for folder in list_checkpoints(run_folder)]
    for milestone in milestones:
        if steps and max(steps) > milestone and not checkpoint_folder(run_folder, milestone).is_dir():
            raise ConfigError(
                f"--milestones {milestone}: {run_folder} has passed this step and has only kept the steps "
                f"{', '.join(map(str, steps))}; name some of these or later steps, or another folder with --out"
            )


def choose_branch_folder(out: Path, milestone: int, config: Config) -> Path:
    """Return the run folder for a branch: a new folder, or the folder of a run with the settings of ``config``.

    The folder's name is, for example, ``decay-from-40-to-50``. If a branch with other settings already has this name,
    the new name is ``decay-from-40-to-50-2``.

    Args:
        out: the parent folder of all branches.
        milestone: the step from which the branch starts.
    """
    name = f"decay-from-{milestone}-to-{config.schedule.max_steps}"
    folders = (out / (f"{name}-{number}" if number > 1 else name) for number in count(1))
    return next(folder for folder in folders if not _changes(folder, config))


def _changes(run_folder: Path, config: Config) -> dict[str, str]:
    """Return one text per setting that affects the results of a run and differs from ``config``."""
    for folder in reversed(list_checkpoints(run_folder)):
        with suppress(CheckpointError):  # a damaged checkpoint, which the run will skip, too
            changes = changed_settings(read_state_file(folder).config, dump_config(config))
            keys = [key for key in changes if key.startswith(_OF_NUMBERS) and key not in _NOT_OF_NUMBERS]
            return {key: f"{key} {changes[key]}" for key in keys}
    return {}
