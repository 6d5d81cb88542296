"""95% intervals equal published values, and cover the truth in a simulation."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.evaluation.intervals import FEWEST_VALUES, bootstrap_ratio, normal_mean, wilson


@pytest.mark.parametrize(
    ("successes", "trials", "expected"),
    [
        (0, 10, (0.0, 0.2775)),  # Newcombe 1998, Statistics in Medicine 17, table I and formula
        (81, 263, (0.2553, 0.3662)),
        (15, 148, (0.0624, 0.1605)),
        (1, 29, (0.0061, 0.1718)),
        (10, 10, (0.7225, 1.0)),
    ],
)
def test_wilson(successes: int, trials: int, expected: tuple[float, float]) -> None:
    assert wilson(successes, trials) == pytest.approx(expected, abs=1e-4)


def test_normal_mean() -> None:
    assert normal_mean([0.0] * 50 + [2.0] * 50) == pytest.approx((1 - 1.96 * 0.1005, 1 + 1.96 * 0.1005), abs=1e-4)


@pytest.mark.parametrize("count", [1, FEWEST_VALUES - 1, FEWEST_VALUES])
def test_a_few_values_have_no_interval(count: int) -> None:
    """Of two values, the normal interval is six times too narrow, and the bootstrap draws only three means."""
    values = np.linspace(1.0, 2.0, count).tolist()
    found = normal_mean(values), bootstrap_ratio(values, [1.0] * count)
    assert [interval is None for interval in found] == [count < FEWEST_VALUES] * 2


def test_bootstrap_ratio_covers_the_truth_and_is_reproducible() -> None:
    draw = np.random.default_rng(0)
    inside = 0
    for _ in range(40):
        sizes = draw.integers(1, 50, 100)
        losses = sizes * 3.0 + draw.normal(0, 5, 100)
        bounds = bootstrap_ratio(losses, sizes)
        assert bounds and bounds == bootstrap_ratio(losses, sizes)
        inside += bounds[0] < 3.0 < bounds[1]
    assert 33 <= inside <= 40
