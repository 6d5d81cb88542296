"""The colours of page and pictures, each in a light and a dark variant."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Colour:
    """One colour; the light variants are all different, so that they can be told from each other in an SVG."""

    name: str
    light: str
    dark: str


INK = Colour("ink", "#1c2128", "#e6edf3")
MUTED = Colour("muted", "#6e7781", "#8b949e")
PAPER = Colour("paper", "#fefefe", "#0f1419")
RULE = Colour("rule", "#d0d7de", "#30363d")

#: Of the runs, in turn; told apart by people who do not see red and green as well.
RUNS = (
    Colour("run-1", "#0b62c4", "#58a6ff"),
    Colour("run-2", "#d1570a", "#ff9d4d"),
    Colour("run-3", "#0f8a6a", "#3fd6ac"),
    Colour("run-4", "#b0328f", "#f08bd6"),
    Colour("run-5", "#8a6d00", "#e3c443"),
    Colour("run-6", "#5c4bc9", "#b3a6ff"),
)


def css_variable(colour: Colour) -> str:
    """How a style names it."""
    return f"var(--{colour.name})"


def css_variables(*, dark: bool) -> Iterator[str]:
    """Declarations of all colours."""
    for colour in (INK, MUTED, PAPER, RULE, *RUNS):
        yield f"--{colour.name}: {colour.dark if dark else colour.light};"
