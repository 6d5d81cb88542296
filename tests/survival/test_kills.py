"""SIGKILL at random moments, and the documented exit statuses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.chaos import Outcome, sections_of, survive
from tests.support.runs import REPOSITORY, Curve, curve_of


@pytest.mark.parametrize("seed", [11, 12, 13])
def test_a_run_killed_at_random_reaches_the_same_end(
    seed: int, corpus: Path, tmp_path: Path, uninterrupted: Callable[[], Curve]
) -> None:
    """A short, seeded version of ``make chaos``."""
    outcome: Outcome = survive(0, seed, sections_of(corpus), tmp_path, uninterrupted())
    assert outcome.problems == [], outcome


@pytest.fixture(scope="module")
def uninterrupted(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Curve]:
    curves: list[Curve] = []

    def curve() -> Curve:
        if not curves:
            curves.append(curve_of("ddp", tmp_path_factory.mktemp("uninterrupted"), sections_of(corpus)))
        return curves[0]

    return curve


def test_the_exit_statuses_are_documented() -> None:
    text = (REPOSITORY / "docs" / "checkpoints.md").read_text(encoding="utf-8")
    for status in (0, 2, 3, 130, 138, 143):
        assert f"| {status} |" in text
