"""Find out whether an evaluation that a signal stopped must be repeated. This module does not import torch."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipeline.checkpoint.state import TrainingState
from pipeline.run_folder.metrics import SAMPLE_KEY, TASK_PREFIX, read_metrics


def with_recorded_evaluation(state: TrainingState, run_folder: Path) -> TrainingState:
    """Return the state after its due evaluation, if the run's metrics already contain the results.

    An earlier start may have repeated the evaluation without saving another checkpoint of this step. If the metrics
    contain no results, or if no evaluation is due, return ``state`` unchanged.
    """
    if not state.evaluation_is_due:
        return state
    rows = [row for row in read_metrics(run_folder) if row["step"] == state.step and _is_of_evaluation(row)]
    if not rows:
        return state
    validation = state.validation
    for loss in [row["val_loss"] for row in rows if row.get("val_loss") is not None][-1:]:
        validation = validation.after(state.step, loss)
    return replace(state, evaluation_is_due=False, validation=validation)


def _is_of_evaluation(row: Mapping[str, Any]) -> bool:
    return any(key in ("val_loss", SAMPLE_KEY) or key.startswith(TASK_PREFIX) for key in row)
