"""Define the colors of the report and its charts."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Colour:
    """A color with a light and a dark variant.

    A chart is drawn with the light variants. In the SVG, ``draw`` then replaces each light variant by the CSS variable
    of the color. Therefore, no two colors may have the same light variant.
    """

    name: str
    light: str
    dark: str

    @property
    def css(self) -> str:
        return f"var(--{self.name})"


INK = Colour("ink", "#1c2128", "#e6edf3")
MUTED = Colour("muted", "#6e7781", "#8b949e")
PAPER = Colour("paper", "#fefefe", "#0f1419")
RULE = Colour("rule", "#d0d7de", "#30363d")

#: The colors of the runs, which people with red-green blindness can distinguish.
RUNS = (
    Colour("run-1", "#0b62c4", "#58a6ff"),
    Colour("run-2", "#d1570a", "#ff9d4d"),
    Colour("run-3", "#0f8a6a", "#3fd6ac"),
    Colour("run-4", "#b0328f", "#f08bd6"),
    Colour("run-5", "#8a6d00", "#e3c443"),
    Colour("run-6", "#5c4bc9", "#b3a6ff"),
)
ALL = (INK, MUTED, PAPER, RULE, *RUNS)
