"""The learning rate rises linearly, falls along half a cosine, and depends on the step alone."""

from __future__ import annotations

from itertools import pairwise

import pytest

from pipeline.config.schema import OptimizerConfig, ScheduleConfig
from pipeline.training.schedule import lr_at

PEAK = 2e-3
OPTIMIZER = OptimizerConfig(learning_rate=PEAK)
SCHEDULE = ScheduleConfig(warmup_steps=10, max_steps=110, min_lr_ratio=0.1)


@pytest.mark.parametrize(
    ("step", "share_of_peak"),
    [
        (0, 0.1),  # the first step has a rate above zero
        (4, 0.5),
        (9, 1.0),
        (10, 1.0),
        (35, 0.1 + 0.9 * 0.8535533905932737),  # a quarter of the decay: (1 + cos 45 degrees) / 2
        (60, 0.55),
        (110, 0.1),
        (111, 0.1),
        (100_000, 0.1),
    ],
)
def test_values(step: int, share_of_peak: float) -> None:
    assert lr_at(step, OPTIMIZER, SCHEDULE) == pytest.approx(share_of_peak * PEAK, rel=1e-12)


def test_it_rises_to_the_peak_and_then_only_falls() -> None:
    rates = [lr_at(step, OPTIMIZER, SCHEDULE) for step in range(120)]
    assert max(rates) == PEAK
    assert all(a < b for a, b in pairwise(rates[:10]))
    assert all(a >= b for a, b in pairwise(rates[10:]))
    assert min(rates[10:]) == pytest.approx(0.1 * PEAK)


def test_without_warmup_it_starts_at_the_peak() -> None:
    assert lr_at(0, OPTIMIZER, ScheduleConfig(warmup_steps=0, max_steps=5)) == PEAK


def test_warmup_may_be_the_whole_run() -> None:
    schedule = ScheduleConfig(warmup_steps=4, max_steps=4)
    assert [lr_at(step, OPTIMIZER, schedule) for step in range(4)] == [PEAK / 4, PEAK / 2, PEAK * 3 / 4, PEAK]


@pytest.mark.parametrize(("ratio", "last"), [(0.0, 0.0), (1.0, PEAK)])
def test_the_last_rate_is_the_ratio_of_the_peak(ratio: float, last: float) -> None:
    schedule = ScheduleConfig(warmup_steps=0, max_steps=10, min_lr_ratio=ratio)
    assert lr_at(10, OPTIMIZER, schedule) == last
    assert lr_at(0, OPTIMIZER, schedule) == PEAK
