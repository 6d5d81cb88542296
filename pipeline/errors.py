"""Define the errors in training and evaluation that a user can correct."""

import signal

from data_tools.errors import UserError


class ConfigError(UserError):
    """The config of a run is wrong, or the run cannot start with this config."""


class CheckpointError(UserError):
    """A checkpoint is missing or damaged, belongs to another model, or could not be written."""


class TrainingError(UserError):
    """A run cannot continue, for example because the gradients are not finite. All ranks raise it."""

    is_known_to_all = True


class ReportError(UserError):
    """A report cannot be written, for example because a folder is not a run folder."""


class LostRankError(UserError):
    """Another rank has died or hangs. To continue the run, start the same command again."""

    exit_status = 3
    is_known_to_all = True


class MainRankError(UserError):
    """The main rank has raised a ``UserError``. The other ranks raise this error, and one rank per host prints it."""

    is_known_to_all = True

    def __init__(self, message: str, exit_status: int) -> None:
        super().__init__(message)
        self.exit_status = exit_status


class EvaluationStopped(Exception):
    """All ranks have stopped an evaluation, because a signal asked the run to stop."""


class Interrupted(UserError):
    """A signal has stopped the run. To continue the run, start the same command again."""

    is_known_to_all = True

    def __init__(self, message: str, received: signal.Signals) -> None:
        super().__init__(message)
        self.exit_status = 128 + received  # the status that a shell reports for a process killed by the signal
