"""Errors of training and evaluation that a user can fix. See ``data_tools.errors.UserError``."""

import signal

from data_tools.errors import UserError


class ConfigError(UserError):
    """A run config that is wrong or cannot be carried out. Raised before training starts."""


class CheckpointError(UserError):
    """A checkpoint that is missing, damaged, or belongs to another model."""


class TrainingError(UserError):
    """A run that cannot continue, for example because it has no data or its gradients are not finite."""


class ReportError(UserError):
    """A report that cannot be made, for example because a folder holds no run."""


class LostRankError(UserError):
    """Another rank died or hangs. The same command continues the run."""

    exit_status = 3


class MainRankError(UserError):
    """The main rank raised a ``UserError``. The other ranks raise this one and exit without printing it."""

    def __init__(self, message: str, exit_status: int) -> None:
        super().__init__(message)
        self.exit_status = exit_status


class Interrupted(UserError):
    """A signal asked the run to stop, and its state is saved. The same command continues the run."""

    def __init__(self, message: str, received: signal.Signals) -> None:
        super().__init__(message)
        self.exit_status = 128 + received  # the status that a shell reports for a process killed by the signal
