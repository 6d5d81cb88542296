"""Which curves a report has, as numbers: what is drawn over what, and for which run."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.report.runs import Row, Run

MOST_POINTS = 2000  # of a line: more than a screen can show


@dataclass(frozen=True)
class Axis:
    """What runs to the right: a key of the rows, in a unit that a person reads."""

    key: str
    label: str
    unit: float = 1.0  # of the key's values that make one on the axis


STEPS = Axis("step", "steps")
TOKENS = Axis("tokens", "tokens")
HOURS = Axis("elapsed_s", "hours", 3600.0)
MINUTES = Axis("elapsed_s", "minutes", 60.0)
LONGEST_IN_MINUTES_S = 2 * 3600.0


@dataclass(frozen=True)
class Curve:
    """Points of one run."""

    run: int  # its place among the runs of the report
    label: str
    x: list[float]
    y: list[float]
    dotted: bool = False  # few points that were measured now and then, as against a line


@dataclass(frozen=True)
class Chart:
    """One picture."""

    name: str  # of its file
    title: str
    axis: Axis
    curves: list[Curve]
    logarithmic: bool = False
    from_zero: bool = False
    percent: bool = False


def charts_of(runs: Sequence[Run]) -> list[Chart]:
    """All pictures of a report; those that no run has numbers for are left out."""
    charts = [
        loss_chart(runs, "loss_by_steps", STEPS),
        loss_chart(runs, "loss_by_tokens", TOKENS),
        loss_chart(runs, "loss_by_time", _time_axis(runs)),
        _difference_chart(runs),
        _training_chart(runs, "learning_rate", "Learning rate", "lr"),
        _training_chart(runs, "grad_norm", "Gradient norm before clipping", "grad_norm", logarithmic=True),
        _training_chart(runs, "tokens_per_s", "Tokens per second, all ranks", "tokens_per_s", from_zero=True),
        _training_chart(runs, "mfu", "MFU: share of the measured matrix ceiling", "mfu", from_zero=True, percent=True),
        _training_chart(runs, "peak_memory", "Peak memory of the main rank, GiB", "peak_memory_gib", from_zero=True),
    ]
    return [chart for chart in charts if chart.curves]


def _time_axis(runs: Sequence[Run]) -> Axis:
    """Hours; minutes where hours would be fractions."""
    longest_s = max((max(run.values(HOURS.key), default=0.0) for run in runs), default=0.0)
    return MINUTES if longest_s < LONGEST_IN_MINUTES_S else HOURS


def loss_chart(runs: Sequence[Run], name: str, axis: Axis) -> Chart:
    """Training and validation of each run."""
    curves = []
    for i, run in enumerate(runs):
        curves.append(_curve(i, f"{run.label}, training", run.training, axis, "loss"))
        curves.append(_curve(i, f"{run.label}, validation", run.validation, axis, "val_loss", dotted=True))
    return Chart(name, f"Loss against {axis.label}", axis, _with_points(curves), logarithmic=True)


def _training_chart(runs: Sequence[Run], name: str, title: str, key: str, **look: bool) -> Chart:
    curves = [_curve(i, run.label, run.training, STEPS, key) for i, run in enumerate(runs)]
    return Chart(name, title, STEPS, _with_points(curves), **look)


def _difference_chart(runs: Sequence[Run]) -> Chart:
    """Training loss of each further run less that of the first, at the steps that both have logged."""
    reference = {row["step"]: row["loss"] for row in runs[0].training if row["loss"] is not None}
    curves = []
    for i, run in enumerate(runs[1:], start=1):
        rows = [
            {"step": row["step"], "difference": row["loss"] - reference[row["step"]]}
            for row in run.training
            if row["step"] in reference and row["loss"] is not None
        ]
        curves.append(_curve(i, run.label, rows, STEPS, "difference"))
    return Chart("loss_difference", f"Training loss less that of {runs[0].label}", STEPS, _with_points(curves))


def _with_points(curves: Iterable[Curve]) -> list[Curve]:
    return [curve for curve in curves if curve.x]


def _curve(run: int, label: str, rows: Sequence[Row], axis: Axis, key: str, *, dotted: bool = False) -> Curve:
    points = [(row[axis.key] / axis.unit, row[key]) for row in rows if _has(row, axis.key) and _has(row, key)]
    points = thinned(points, MOST_POINTS)
    return Curve(run, label, [x for x, _ in points], [y for _, y in points], dotted)


def _has(row: dict[str, Any], key: str) -> bool:
    return row.get(key) is not None


def thinned(points: list[tuple[float, float]], most: int) -> list[tuple[float, float]]:
    """At most ``most`` points that look the same: of each stretch its lowest and its highest one."""
    if len(points) <= most:
        return points
    stretches = most // 2
    kept = []
    for i in range(stretches):
        stretch = points[i * len(points) // stretches : (i + 1) * len(points) // stretches]
        extremes = {stretch.index(min(stretch, key=_height)), stretch.index(max(stretch, key=_height))}
        kept += [stretch[position] for position in sorted(extremes)]
    return kept


def _height(point: tuple[float, float]) -> float:
    return point[1]
