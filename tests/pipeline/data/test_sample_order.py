"""Every window once per epoch in a random order; every dataset of a mixture with its exact share."""

from __future__ import annotations

import random
import tracemalloc
from fractions import Fraction

import numpy as np
import pytest

from pipeline.data.sample_order import Mixture, SampleOrder

SIZES = [1, 2, 3, 4, 5, 15, 16, 17, 63, 64, 65, 255, 256, 257, 1000, 4095, 4096, 4097]
WEIGHTS = [
    [1.0],
    [1.0, 1.0],
    [0.7, 0.2, 0.1],
    [1.0, 2.0, 3.0, 5.0, 8.0],
    [0.333, 0.667],
    [100.0, 1.0, 1.0, 1.0],
    [1e-4, 1.0],
    [0.9, 0.09, 0.009, 0.0009, 0.0001],
    [0.12, 0.34, 0.01, 0.23, 0.05, 0.25],
]


def epoch(n: int, seed: int, number: int = 0) -> np.ndarray:
    return SampleOrder(n, seed).windows(np.arange(number * n, (number + 1) * n, dtype=np.int64))


@pytest.mark.parametrize("n", SIZES)
def test_every_window_once_per_epoch(n: int) -> None:
    for number in (0, 1, 5):
        assert sorted(epoch(n, 1337, number)) == list(range(n))


@pytest.mark.parametrize("n", [63, 64, 65, 1000])
def test_epochs_differ(n: int) -> None:
    orders = [tuple(epoch(n, 1337, number)) for number in range(4)]
    assert len(set(orders)) == 4


@pytest.mark.parametrize("n", [63, 64, 65, 1000])
def test_seeds_differ(n: int) -> None:
    assert len({tuple(epoch(n, seed)) for seed in range(10)}) == 10


def test_the_order_of_a_seed_never_changes() -> None:
    assert epoch(10, 1337).tolist() == [1, 7, 2, 5, 0, 3, 4, 9, 6, 8]


@pytest.mark.parametrize("n", [1, 2, 17, 1000])
def test_any_sample_is_found_without_earlier_ones(n: int) -> None:
    order = SampleOrder(n, 3)
    samples = np.arange(0, 3 * n, dtype=np.int64)
    together = order.windows(samples)
    alone = [int(order.windows(np.array([sample], dtype=np.int64))[0]) for sample in samples]
    assert together.tolist() == alone


def test_samples_may_be_requested_in_any_order() -> None:
    order = SampleOrder(100, 3)
    samples = np.array([250, 3, 99, 100, 101, 3], dtype=np.int64)  # three epochs, out of order, one twice
    assert order.windows(samples).tolist() == [int(order.windows(samples[i : i + 1])[0]) for i in range(6)]


@pytest.mark.parametrize("n", [1000, 4096, 4097, 100_000])
def test_the_order_looks_shuffled(n: int) -> None:
    """Correlations of a random permutation have deviation 1/sqrt(n)."""
    limit = 4.5 / np.sqrt(n)
    for seed in range(3):
        order = epoch(n, seed)
        assert abs(np.corrcoef(np.arange(n), order)[0, 1]) < limit
        assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < limit
        assert abs(np.corrcoef(order, epoch(n, seed, 1))[0, 1]) < limit


def test_neighbours_in_the_data_are_not_neighbours_in_the_order() -> None:
    steps = np.abs(np.diff(epoch(100_000, 1)))
    assert (steps == 1).sum() < 20  # a random permutation has 2 on average
    assert (epoch(100_000, 1) == np.arange(100_000)).sum() < 10  # and 1 in its own place


def test_every_window_is_equally_likely_to_come_first() -> None:
    firsts = [int(SampleOrder(8, seed).windows(np.zeros(1, dtype=np.int64))[0]) for seed in range(1600)]
    counts = np.bincount(firsts, minlength=8)
    assert ((counts - 200) ** 2 / 200).sum() < 30  # chi-square with 7 degrees of freedom: 1e-4


def test_memory_does_not_grow_with_the_data() -> None:
    n = 10**12
    order = SampleOrder(n, 1)
    samples = np.array([0, 1, n - 1, n, 7 * n + 12345], dtype=np.int64)
    tracemalloc.start()
    try:
        windows = order.windows(samples)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak_bytes < 1 << 20
    assert ((windows >= 0) & (windows < n)).all()
    assert len(set(windows.tolist())) == 5


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
def test_each_share_is_exact_to_two_samples_after_any_number_of_samples(weights: list[float]) -> None:
    mixture = Mixture(weights)
    assert sum(mixture.shares) == 1
    counts = [0] * len(weights)
    for sample in range(3000):
        index, ordinal = mixture.locate(sample)
        assert ordinal == counts[index], "ordinals of a dataset are consecutive"
        counts[index] += 1
        assert all(abs(count - (sample + 1) * share) < 2 for count, share in zip(counts, mixture.shares, strict=True))
    assert mixture.counts(3000) == counts


def test_random_mixtures_hold_their_shares_at_large_counts() -> None:
    """Up to 40 datasets with weights over six orders of magnitude, and up to 10**15 samples."""
    draw = random.Random(5)
    worst = 0.0
    for _ in range(200):
        weights = [round(10 ** draw.uniform(-3, 3), 6) for _ in range(draw.randint(2, 40))]
        mixture = Mixture(weights)
        samples = draw.randrange(10**15)
        counts = mixture.counts(samples)
        assert sum(counts) == samples
        worst = max(worst, *(abs(count - samples * share) for count, share in zip(counts, mixture.shares, strict=True)))
        index, ordinal = mixture.locate(samples)
        assert ordinal == counts[index]
        after = mixture.counts(samples + 1)
        assert [b - a for a, b in zip(counts, after, strict=True)] == [int(i == index) for i in range(len(weights))]
    assert 0.5 < worst < 2


def test_a_weight_is_an_exact_decimal_number() -> None:
    assert Mixture([0.7, 0.2, 0.1]).shares == [Fraction(7, 10), Fraction(2, 10), Fraction(1, 10)]
    assert Mixture([7, 2, 1]).shares == Mixture([0.7, 0.2, 0.1]).shares
    assert Mixture([0.7, 0.2, 0.1]).counts(10**18) == [7 * 10**17, 2 * 10**17, 10**17]


def test_the_data_sets_alternate() -> None:
    """Samples of equal weights alternate, and rare samples are evenly spaced."""
    datasets = [Mixture([1, 1]).locate(sample)[0] for sample in range(100)]
    assert all(datasets[at] != datasets[at + 1] for at in range(99))
    rare = [sample for sample in range(10_000) if Mixture([1, 99]).locate(sample)[0] == 0]
    assert set(np.diff(rare).tolist()) == {100}


def test_locate_all_equals_locate() -> None:
    mixture = Mixture([0.5, 0.3, 0.2])
    samples = np.array([10**12, 0, 7, 8, 7], dtype=np.int64)
    datasets, ordinals = mixture.locate_all(samples)
    assert list(zip(datasets.tolist(), ordinals.tolist(), strict=True)) == [mixture.locate(s) for s in samples.tolist()]
    assert (datasets.dtype, ordinals.dtype) == (np.int64, np.int64)
    assert [array.shape for array in mixture.locate_all(samples[:0])] == [(0,), (0,)]
