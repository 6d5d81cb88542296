"""Errors of training and evaluation that a user can mend. See ``data_tools.errors.UserError``."""

from data_tools.errors import UserError


class ConfigError(UserError):
    """A run config that is wrong, or that asks for what cannot be. Known before anything starts."""


class CheckpointError(UserError):
    """A checkpoint that is missing, damaged, or belongs to another model."""


class TrainingError(UserError):
    """A run that cannot go on: no data, a loss that is not finite."""
