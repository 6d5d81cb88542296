"""Errors of training and evaluation that a user can mend. See ``data_tools.errors.UserError``."""

import signal

from data_tools.errors import UserError


class ConfigError(UserError):
    """A run config that is wrong, or that asks for what cannot be. Known before anything starts."""


class CheckpointError(UserError):
    """A checkpoint that is missing, damaged, or belongs to another model."""


class TrainingError(UserError):
    """A run that cannot go on: no data, losses that are not finite."""


class ReportError(UserError):
    """Runs that cannot be shown: no run in a folder, or nothing to draw with."""


class LostRankError(UserError):
    """Another rank died, or has not been heard of for too long. To run again continues."""

    exit_status = 3


class ToldByMainRank(UserError):
    """The main rank cannot go on and says why; the others end with it, silently."""

    def __init__(self, message: str, exit_status: int) -> None:
        super().__init__(message)
        self.exit_status = exit_status


class Interrupted(UserError):
    """A signal asked the run to stop; its state is saved. To run again continues."""

    def __init__(self, message: str, received: signal.Signals) -> None:
        super().__init__(message)
        self.exit_status = 128 + received  # as a shell reports a process that the signal ended
