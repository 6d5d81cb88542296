"""The benchmark of the output layer runs both variants the same number of times."""

from __future__ import annotations

from benchmarks.output_layer import measure


def test_both_variants_are_measured() -> None:
    seconds = measure(5, 8, 89, rounds=2, is_compiled=False)
    assert [len(times) for in_blocks in (False, True) for times in seconds[in_blocks]] == [4] * 4
    assert all(time > 0 for variant in seconds.values() for time in variant[0])
