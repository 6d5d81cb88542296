"""The benchmark of the output layer runs all ways the same number of times."""

from __future__ import annotations

from benchmarks.output_layer import WAYS, measure


def test_all_ways_are_measured() -> None:
    seconds = measure(5, 8, 89, rounds=2, is_compiled=False)
    assert [len(times) for name in WAYS for times in seconds[name]] == [4] * 6
    assert all(time > 0 for elapsed, _ in seconds.values() for time in elapsed)
