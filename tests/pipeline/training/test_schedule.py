"""The learning rate rises linearly, falls along the curve of the schedule, and depends on the step alone."""

from __future__ import annotations

from itertools import pairwise
from typing import Any, get_args

import pytest
from pydantic import ValidationError

from pipeline.config.schema import AveragingConfig, OptimizerConfig, ScheduleConfig
from pipeline.training.schedule import ema_decay_at, lr_at

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


def choices(key: str) -> list[str]:
    """Return the values that the config allows for a key of ``schedule``."""
    annotation = ScheduleConfig.model_fields[key].annotation
    literals = [annotation, *get_args(annotation)]
    return [value for literal in literals for value in get_args(literal) if isinstance(value, str)]


@pytest.mark.parametrize("key", ["name", "decay_shape"])
def test_every_curve_of_the_config_has_a_formula(key: str) -> None:
    assert "linear" in choices(key)
    for value in choices(key):
        schedule = SCHEDULE.model_copy(update={"name": "wsd", key: value})
        assert lr_at(100, OPTIMIZER, schedule) > 0, value


def test_a_curve_without_a_formula_fails_in_the_first_step() -> None:
    """A new name in the schema must neither train with the formula of another curve, nor fail in the decay."""
    with pytest.raises(KeyError, match="new"):
        lr_at(0, OPTIMIZER, SCHEDULE.model_copy(update={"name": "new"}))


def test_the_decay_of_the_average_rises_to_its_value() -> None:
    averaging = AveragingConfig(ema=0.99)
    assert [ema_decay_at(step, averaging) for step in (0, 8, 889, 890, 10**6)] == pytest.approx(
        [0.1, 0.5, 890 / 899, 0.99, 0.99], rel=1e-12
    )
    assert ema_decay_at(5, AveragingConfig()) is None


@pytest.mark.parametrize(
    ("settings", "shares_of_peak"),
    [
        ({"name": "linear"}, {9: 1.0, 10: 1.0, 35: 0.775, 60: 0.55, 110: 0.1, 500: 0.1}),
        ({"name": "constant"}, {4: 0.5, 10: 1.0, 109: 1.0, 110: 1.0, 500: 1.0}),
        ({"name": "wsd", "decay_steps": 40}, {4: 0.5, 10: 1.0, 69: 1.0, 79: 0.775, 89: 0.55, 109: 0.1, 500: 0.1}),
        ({"name": "wsd", "decay_steps": 40, "decay_shape": "cosine"}, {69: 1.0, 89: 0.55, 109: 0.1, 110: 0.1}),
        ({"name": "wsd", "decay_steps": 40, "decay_shape": "1-sqrt"}, {69: 1.0, 79: 0.55, 109: 0.1, 110: 0.1}),
        ({"name": "wsd"}, {87: 1.0, 98: 0.55, 109: 0.1}),  # a fifth of the run
        ({"name": "wsd", "decay_steps": 100}, {9: 1.0, 10: 0.991, 59: 0.55, 109: 0.1}),  # no stable steps
    ],
)
def test_other_curves(settings: dict[str, Any], shares_of_peak: dict[int, float]) -> None:
    schedule = ScheduleConfig(warmup_steps=10, max_steps=110, min_lr_ratio=0.1, **settings)
    rates = {step: lr_at(step, OPTIMIZER, schedule) / PEAK for step in shares_of_peak}
    assert rates == pytest.approx(shares_of_peak, rel=1e-12)


def test_a_longer_stable_run_has_the_same_rates_until_the_decay_of_the_shorter_one() -> None:
    """A run can therefore continue after a checkpoint before its decay, and decay later."""
    short, long = (ScheduleConfig(name="wsd", warmup_steps=10, max_steps=n, decay_steps=20) for n in (60, 100))
    rates = [[lr_at(step, OPTIMIZER, schedule) for step in range(41)] for schedule in (short, long)]
    assert rates[0][:40] == rates[1][:40] and rates[0][40] < rates[1][40]


@pytest.mark.parametrize("shape", ["linear", "cosine", "1-sqrt"])
@pytest.mark.parametrize("steps", [1, 2, 30])
def test_every_step_of_a_decay_is_below_the_peak_and_the_last_one_is_the_minimum(shape: Any, steps: int) -> None:
    schedule = ScheduleConfig(
        name="wsd", warmup_steps=5, max_steps=50, decay_steps=steps, decay_shape=shape, min_lr_ratio=0.1
    )
    rates = [lr_at(step, OPTIMIZER, schedule) for step in range(50 - steps - 1, 50)]
    assert rates[0] == PEAK
    assert all(a > b for a, b in pairwise(rates))
    assert rates[-1] == pytest.approx(0.1 * PEAK, rel=1e-12)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"decay_steps": 10}, 'only name "wsd"'),
        ({"name": "linear", "decay_shape": "cosine"}, 'only name "wsd"'),
        ({"name": "wsd", "decay_steps": 101}, "must not exceed max_steps"),
        ({"name": "wsd", "decay_shape": "sqrt"}, "decay_shape"),
        ({"name": "stable"}, "name"),
    ],
)
def test_a_schedule_that_cannot_be_followed_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        ScheduleConfig(warmup_steps=10, max_steps=110, **settings)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, "warm-up 10 steps, cosine to 0.1 of the peak at step 1,100"),
        ({"name": "constant"}, "warm-up 10 steps, then constant to step 1,100"),
        (
            {"name": "wsd", "decay_steps": 100},
            "warm-up 10 steps, constant to step 1,000, linear to 0.1 of the peak at step 1,100",
        ),
    ],
)
def test_in_words(settings: dict[str, Any], words: str) -> None:
    assert str(ScheduleConfig(warmup_steps=10, max_steps=1100, **settings)) == words


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
