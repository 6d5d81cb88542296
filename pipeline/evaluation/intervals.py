"""Compute the 95% confidence intervals of evaluation results. The examples of a task are treated as a random sample."""

import math
from collections.abc import Sequence

import numpy as np

Z_95 = 1.959963984540054  # 95% of a normal distribution lies within this many standard deviations of the mean
BOOTSTRAP_SAMPLES = 1000
BOOTSTRAP_SEED = 1234

#: With fewer independent values, the intervals of means would be too narrow, so there are none. Wilson's interval holds
#: for any number.
FEWEST_VALUES = 30

# The names of the intervals in the results.
WILSON = "95%, Wilson"
NORMAL = "95%, normal, of the mean log-likelihood"
WINDOWS = "95%, normal, of the mean over windows"
BOOTSTRAP = f"95%, percentiles of {BOOTSTRAP_SAMPLES} bootstrap samples"
TOO_FEW = f"none, fewer than {FEWEST_VALUES} values"

Interval = tuple[float, float]


def wilson(successes: int, trials: int) -> Interval:
    """Return the 95% Wilson score interval of ``successes / trials``, within [0, 1] (Wilson 1927)."""
    share, spread = successes / trials, Z_95**2 / trials
    centre = share + spread / 2
    half = math.sqrt(spread * (share * (1 - share) + spread / 4))
    return max(0.0, (centre - half) / (1 + spread)), min(1.0, (centre + half) / (1 + spread))


def normal_mean(values: Sequence[float]) -> Interval | None:
    """Return the 95% interval of the mean of the values, by the normal distribution.

    With fewer than ``FEWEST_VALUES`` values, return None.
    """
    if len(values) < FEWEST_VALUES:
        return None
    mean = float(np.mean(values))
    half = Z_95 * float(np.std(values, ddof=1)) / math.sqrt(len(values))
    return mean - half, mean + half


def bootstrap_ratio(numerators: Sequence[float], denominators: Sequence[float]) -> Interval | None:
    """Return the 95% bootstrap percentile interval of sum(numerators) / sum(denominators). The seed is fixed.

    With fewer than ``FEWEST_VALUES`` numerators, return None.
    """
    if len(numerators) < FEWEST_VALUES:
        return None
    above, below = np.asarray(numerators), np.asarray(denominators)
    generator = np.random.default_rng(BOOTSTRAP_SEED)
    ratios = []
    for _ in range(BOOTSTRAP_SAMPLES):
        drawn = generator.integers(0, len(above), len(above))
        ratios.append(above[drawn].sum() / below[drawn].sum())
    low, high = np.percentile(ratios, [2.5, 97.5])
    return float(low), float(high)
