"""Compare the table of the recipes in ``docs/planning.md`` with the planner."""

from __future__ import annotations

import pytest

from benchmarks.recipe_table import RECIPES, rows_of
from tests.support.runs import CONFIGS, REPOSITORY


def test_the_page_has_every_recipe() -> None:
    assert {path.stem for path in CONFIGS.glob("gpt2_*.json")} == set(RECIPES)


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_page_shows_what_the_planner_says(recipe: str) -> None:
    """If this fails, copy the rows that `python -m benchmarks.recipe_table` prints into the page."""
    page = (REPOSITORY / "docs" / "planning.md").read_text(encoding="utf-8").splitlines()
    assert [line for line in page if line.startswith(f"| `{recipe}` |")] == list(rows_of(recipe))
