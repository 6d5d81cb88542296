"""A run ends at a target, or when the validation loss no longer improves; both depend on stored state alone."""

from __future__ import annotations

import math
from typing import Any

import pytest

from pipeline.checkpoint.state import ValidationHistory
from pipeline.config.schema import ScheduleConfig
from pipeline.training.early_stop import early_stop_reason


def reason_after(losses: list[float], **settings: Any) -> str | None:
    """Return the reason after evaluations every 10 steps."""
    history = ValidationHistory()
    for number, loss in enumerate(losses):
        history = history.after(10 * (number + 1), loss)
    return early_stop_reason(ScheduleConfig(**settings), history)


def test_no_setting_ends_no_run() -> None:
    assert reason_after([5.0, 6.0, 7.0, 8.0]) is None


@pytest.mark.parametrize(("losses", "stops"), [([], False), ([5.0, 3.5001], False), ([5.0, 3.5], True), ([3.4], True)])
def test_a_target(losses: list[float], stops: bool) -> None:
    reason = reason_after(losses, stop_at_val_loss=3.5)
    assert (reason is not None) == stops
    if reason:
        assert "schedule.stop_at_val_loss 3.5" in reason and f"{losses[-1]:.4f}" in reason


@pytest.mark.parametrize(
    ("losses", "stops"),
    [
        ([5.0, 4.0, 4.1], False),
        ([5.0, 4.0, 4.1, 4.0], True),  # an equal loss is no improvement
        ([5.0, 4.0, 4.1, 3.9, 4.0], False),
        ([5.0, math.nan, math.nan], True),
        ([math.nan, math.nan, math.nan], False),  # nothing was measured
    ],
)
def test_a_plateau(losses: list[float], stops: bool) -> None:
    reason = reason_after(losses, stop_after_evaluations=2)
    assert (reason is not None) == stops
    if reason:
        assert "schedule.stop_after_evaluations 2" in reason


def test_the_best_loss_and_its_step_are_remembered() -> None:
    history = ValidationHistory().after(5, 5.0).after(10, 4.0).after(20, 4.5).after(30, math.inf)
    assert history == ValidationHistory(best_loss=4.0, best_step=10, evaluations_since_best=2)
    assert history.after(40, 3.0) == ValidationHistory(3.0, 40, 0)


def test_the_loss_before_the_first_step_does_not_count() -> None:
    """The run has no checkpoint of these weights, which can be better than all later ones in fine-tuning."""
    history = ValidationHistory().after(0, 2.0)
    assert history == ValidationHistory()
    assert history.after(10, 3.0) == ValidationHistory(3.0, 10, 0)
