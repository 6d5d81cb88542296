"""Decide from the validation losses whether a run ends before ``schedule.max_steps``."""

from pipeline.checkpoint.state import ValidationHistory
from pipeline.config.schema import ScheduleConfig


def early_stop_reason(schedule: ScheduleConfig, validation: ValidationHistory) -> str | None:
    """Return why the run ends now, naming the config key. Returns None if the run continues.

    The answer depends only on state that a checkpoint stores, so a run that has ended early does not continue when
    the same command is given again.
    """
    if validation.best_loss is None:
        return None
    best = f"validation loss {validation.best_loss:.4f} at step {validation.best_step}"
    if schedule.stop_at_val_loss is not None and validation.best_loss <= schedule.stop_at_val_loss:
        return f"{best} has reached schedule.stop_at_val_loss {schedule.stop_at_val_loss:g}"
    patience = schedule.stop_after_evaluations
    if patience is not None and validation.evaluations_since_best >= patience:
        evaluations = validation.evaluations_since_best
        return f"{best} was not improved by {evaluations} evaluations (schedule.stop_after_evaluations {patience})"
    return None
