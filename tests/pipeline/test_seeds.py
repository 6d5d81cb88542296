"""Streams of one seed are independent, and the same everywhere."""

from __future__ import annotations

import itertools

from pipeline.seeds import derive_seed


def test_a_seed_is_fixed_for_ever() -> None:
    assert derive_seed(1337, "dropout", 42) == 4_656_894_472_718_620_590


def test_purposes_do_not_share_streams() -> None:
    purposes = [(), ("weights",), ("order",), ("order", 0), ("order", 1), ("order", 0, 1), ("order", 1, 0)]
    seeds = [derive_seed(base, *purpose) for base, purpose in itertools.product((0, 1, 10), purposes)]
    assert len(set(seeds)) == len(seeds)


def test_torch_and_numpy_accept_the_seed() -> None:
    seeds = [derive_seed(base, "x") for base in range(1000)]
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert max(seeds) > 2**62  # all 63 bits are in use
