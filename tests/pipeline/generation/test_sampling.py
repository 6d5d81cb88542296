"""Temperature, top-k and top-p limit which tokens are drawn."""

from __future__ import annotations

import pytest
import torch

from pipeline.generation.sampling import Sampling, draw

PROBABILITIES = [0.1, 0.4, 0.05, 0.3, 0.15]


def drawn(**options: float | int) -> set[int]:
    """Return all tokens of many draws."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.tensor(PROBABILITIES).log()
    return {draw(logits, Sampling(**options), generator) for _ in range(400)}  # type: ignore[arg-type]


def test_temperature_0_draws_the_likeliest() -> None:
    assert drawn(temperature=0) == {1}


def test_without_limits_all_are_drawn() -> None:
    assert drawn() == {0, 1, 2, 3, 4}


def test_top_k() -> None:
    assert drawn(top_k=2) == {1, 3}
    assert drawn(top_k=99) == {0, 1, 2, 3, 4}


@pytest.mark.parametrize(
    ("top_p", "expected"), [(0.01, {1}), (0.39, {1}), (0.5, {1, 3}), (0.8, {1, 3, 4}), (1.0, None)]
)
def test_top_p_keeps_the_fewest_that_reach_it(top_p: float, expected: set[int] | None) -> None:
    assert drawn(top_p=top_p) == (expected or {0, 1, 2, 3, 4})


def test_top_p_applies_after_top_k() -> None:
    """0.4 / (0.4 + 0.3) = 0.57."""
    assert drawn(top_k=2, top_p=0.55) == {1}
    assert drawn(top_k=2, top_p=0.6) == {1, 3}


def test_top_p_applies_after_the_temperature() -> None:
    assert drawn(temperature=0.1, top_p=0.9) == {1}


def test_the_global_random_stream_is_not_used() -> None:
    logits = torch.tensor(PROBABILITIES).log()
    state = torch.get_rng_state()
    first = [draw(logits, Sampling(), torch.Generator().manual_seed(7)) for _ in range(3)]
    assert len(set(first)) == 1
    assert torch.equal(state, torch.get_rng_state())
