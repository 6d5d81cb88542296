"""Decide whether a run stops before ``schedule.max_steps``, because of its validation losses."""

from pipeline.checkpoint.state import ValidationHistory
from pipeline.config.schema import ScheduleConfig


def early_stop_reason(schedule: ScheduleConfig, validation: ValidationHistory) -> str | None:
    """Return why the run must stop now, or None. The reason names the config key that stops the run.

    The result depends only on the config and on values in checkpoints. A stopped run that is started again therefore
    stops again.
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
