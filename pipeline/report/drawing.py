"""Draw charts with matplotlib, as SVG for the HTML page and as PNG files."""

import io
import math
import re
from dataclasses import dataclass
from html import escape
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FixedLocator, MaxNLocator, NullLocator, PercentFormatter, ScalarFormatter

from pipeline.report.colours import ALL, INK, MUTED, PAPER, RUNS
from pipeline.report.curves import STEPS, TOKENS, Chart, Curve

WIDTH_INCHES = 4.4  # as wide as a phone, so that text is readable on a phone
HEIGHT_INCHES, LEGEND_LINE_INCHES = 3.0, 0.17
PNG_DOTS_PER_INCH = 200
#: The multiples of powers of 10 at which a logarithmic axis may have ticks, fewest first.
TICK_MULTIPLES = (
    (1,),
    (1, 3),
    (1, 2, 5),
    (1, 2, 3, 5),
    (1, 2, 3, 4, 5, 6, 8),
    (1, 1.5, 2, 2.5, 3, 3.5, 4, 4.5, 5, 6, 7, 8, 9),
)
FEWEST_TICKS, MOST_TICKS = 3, 9
LONGEST_LABEL = 34  # characters of an entry in the legend
# The curves of equal runs cover each other. Gaps in dashed curves show the curves below.
DASHES = ((0, ()), (0, (4, 2)), (0, (1, 1.5)), (0, (6, 2, 1, 2)))

STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.titlesize": 10,
    "svg.fonttype": "none",  # write text as text, not as paths
    "text.parse_math": False,  # names may contain dollar signs
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.color": INK.light,
    "axes.labelcolor": INK.light,
    "axes.edgecolor": MUTED.light,
    "xtick.color": MUTED.light,
    "ytick.color": MUTED.light,
    "xtick.labelcolor": INK.light,
    "ytick.labelcolor": INK.light,
    "grid.color": MUTED.light,
    "grid.alpha": 0.3,
    "grid.linewidth": 0.6,
}


@dataclass(frozen=True)
class Picture:
    name: str  # the file name without its suffix
    svg: str  # an <svg> element that uses the page's CSS variables
    png: bytes


def draw(chart: Chart, *, names_runs: bool = False) -> Picture:
    """Draw a chart as PNG in light colors, and as SVG with the colors of the reader's theme, light or dark.

    The SVG names its colors with CSS variables. The HTML page of the report defines these variables.

    Args:
        names_runs: draw a legend even if there is only one curve. Set this if the report compares several runs.
    """
    names = len(chart.curves) if len(chart.curves) > 1 or names_runs else 0
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": chart.name}):
        figure = Figure((WIDTH_INCHES, HEIGHT_INCHES + LEGEND_LINE_INCHES * names), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        axes.set_title(chart.title, loc="left")
        for curve in chart.curves:
            _draw_curve(axes, curve)
        _shape_axes(axes, chart)
        if names:
            figure.legend(loc="outside lower left", ncols=1, frameon=False, fontsize=8)
        svg, png = io.StringIO(), io.BytesIO()
        figure.savefig(svg, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
        figure.savefig(png, format="png", dpi=PNG_DOTS_PER_INCH, facecolor=PAPER.light)
    return Picture(chart.name, _to_page_element(svg.getvalue(), chart.title), png.getvalue())


def _draw_curve(axes: Axes, curve: Curve) -> None:
    label = curve.label if len(curve.label) <= LONGEST_LABEL else f"...{curve.label[3 - LONGEST_LABEL :]}"
    label = f" {label}"  # without the space, matplotlib leaves out labels that begin with an underscore
    colour = RUNS[curve.run % len(RUNS)].light
    if curve.dotted:
        mark = "D" if curve.averaged else "o"
        axes.plot(curve.x, curve.y, mark, label=label, color=colour, markersize=4.5, markerfacecolor=PAPER.light)
    elif len(curve.x) == 1:
        axes.plot(curve.x, curve.y, ".", label=label, color=colour)
    else:
        dashes = DASHES[curve.run % len(DASHES)]
        axes.plot(curve.x, curve.y, label=label, color=colour, linewidth=1.3, linestyle=dashes)


def _shape_axes(axes: Axes, chart: Chart) -> None:
    axes.set_xlabel(chart.axis.label)
    axes.grid()
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=chart.axis in (STEPS, TOKENS), steps=[1, 2, 5, 10]))
    if chart.axis is TOKENS:
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    heights = [y for curve in chart.curves for y in curve.y]
    even = MaxNLocator(6, steps=[1, 2, 2.5, 5, 10])
    axes.yaxis.set_major_locator(even)
    if chart.logarithmic and min(heights) > 0:
        axes.set_yscale("log")
        axes.yaxis.set_minor_locator(NullLocator())
        ticks = log_ticks(*axes.get_ylim())
        axes.yaxis.set_major_locator(FixedLocator(ticks) if len(ticks) >= FEWEST_TICKS else even)
        axes.yaxis.set_major_formatter(ScalarFormatter())
    if chart.percent:
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    if chart.from_zero:
        axes.set_ylim(bottom=0)


def log_ticks(low: float, high: float) -> list[float]:
    """Return at most ``MOST_TICKS`` ticks for a logarithmic axis from ``low`` to ``high``."""
    exponents = range(math.floor(math.log10(low)), math.floor(math.log10(high)) + 1)
    ticks: list[float] = []
    for multiples in reversed(TICK_MULTIPLES):
        ticks = [tick for e in exponents for m in multiples if low <= (tick := m * 10.0**e) <= high]
        if len(ticks) <= MOST_TICKS:
            break
    return ticks[:: max(1, math.ceil(len(ticks) / MOST_TICKS))]


def _to_page_element(svg: str, title: str) -> str:
    element = svg[svg.index("<svg") :]
    element = re.sub(r"<metadata>.*?</metadata>", "", element, flags=re.DOTALL)
    element = re.sub(r' (width|height)="[\d.]+pt"', "", element, count=2)
    element = element.replace("<svg", f'<svg role="img" aria-label="{escape(title)}"', 1)
    for colour in ALL:
        element = element.replace(colour.light, colour.css)
    return element
