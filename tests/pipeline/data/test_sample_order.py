"""Every window once an epoch, in an order that looks random and can be entered anywhere."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

from pipeline.data.sample_order import SampleOrder

SIZES = [1, 2, 3, 4, 5, 15, 16, 17, 63, 64, 65, 255, 256, 257, 1000, 4095, 4096, 4097]


def epoch(n: int, seed: int, number: int = 0) -> np.ndarray:
    return SampleOrder(n, seed).windows(np.arange(number * n, (number + 1) * n, dtype=np.int64))


@pytest.mark.parametrize("n", SIZES)
def test_every_window_once_an_epoch(n: int) -> None:
    for number in (0, 1, 5):
        assert sorted(epoch(n, 1337, number)) == list(range(n))


@pytest.mark.parametrize("n", [63, 64, 65, 1000])
def test_epochs_differ(n: int) -> None:
    orders = [tuple(epoch(n, 1337, number)) for number in range(4)]
    assert len(set(orders)) == 4


@pytest.mark.parametrize("n", [63, 64, 65, 1000])
def test_seeds_differ(n: int) -> None:
    assert len({tuple(epoch(n, seed)) for seed in range(10)}) == 10


def test_the_order_of_a_seed_is_fixed_for_ever() -> None:
    assert epoch(10, 1337).tolist() == [1, 7, 2, 5, 0, 3, 4, 9, 6, 8]


@pytest.mark.parametrize("n", [1, 2, 17, 1000])
def test_any_sample_is_found_without_the_ones_before(n: int) -> None:
    order = SampleOrder(n, 3)
    samples = np.arange(0, 3 * n, dtype=np.int64)
    together = order.windows(samples)
    alone = [int(order.windows(np.array([sample], dtype=np.int64))[0]) for sample in samples]
    assert together.tolist() == alone


def test_the_company_of_a_sample_does_not_matter() -> None:
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
