"""Define the charts of a report and compute their curves, without drawing them."""

from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.report.runs import Row, Run

MOST_POINTS = 2000  # per curve; more than a screen can show


@dataclass(frozen=True)
class Axis:
    key: str
    label: str
    unit: float = 1.0  # the values are divided by this number


STEPS = Axis("step", "steps")
TOKENS = Axis("tokens", "tokens")
HOURS = Axis("elapsed_s", "hours", 3600.0)
MINUTES = Axis("elapsed_s", "minutes", 60.0)
LONGEST_IN_MINUTES_S = 2 * 3600.0


@dataclass(frozen=True)
class Curve:
    run: int  # index of the run in the report
    label: str
    x: list[float]
    y: list[float]
    dotted: bool = False  # draw points and no line, for a few single measurements
    averaged: bool = False  # measured with the moving average of the weights


@dataclass(frozen=True)
class Chart:
    """A chart with the curves of all runs."""

    name: str  # the file name without its suffix
    title: str
    axis: Axis
    curves: list[Curve]
    logarithmic: bool = False
    from_zero: bool = False
    percent: bool = False


def charts_of(runs: Sequence[Run]) -> list[Chart]:
    """Return all charts of a report. A chart without values is left out."""
    longest_s = max((value for run in runs for value in run.values(HOURS.key)), default=0.0)
    charts = [
        loss_chart(runs, "loss_by_steps", STEPS),
        loss_chart(runs, "loss_by_tokens", TOKENS),
        loss_chart(runs, "loss_by_time", MINUTES if longest_s < LONGEST_IN_MINUTES_S else HOURS),
        _difference_chart(runs),
        _training_chart(runs, "learning_rate", "Learning rate", "lr"),
        _training_chart(runs, "grad_norm", "Gradient norm before clipping", "grad_norm", logarithmic=True),
        _training_chart(runs, "tokens_per_s", "Tokens per second, all ranks", "tokens_per_s", from_zero=True),
        _training_chart(runs, "mfu", "MFU: share of the measured matrix ceiling", "mfu", from_zero=True, percent=True),
        _training_chart(runs, "peak_memory", "Peak memory of the main rank, GiB", "peak_memory_gib", from_zero=True),
    ]
    return [chart for chart in charts if chart.curves]


def loss_chart(runs: Sequence[Run], name: str, axis: Axis) -> Chart:
    """Return a chart of training losses, validation losses, and validation losses of the averaged weights (EMA)."""
    curves = []
    for i, run in enumerate(runs):
        curves += _curve(i, f"{run.label}, training", run.rows, axis, "loss")
        curves += _curve(i, f"{run.label}, validation", run.rows, axis, "val_loss", dotted=True)
        label = f"{run.label}, validation of EMA"
        curves += _curve(i, label, run.rows, axis, "val_ema_loss", dotted=True, averaged=True)
    return Chart(name, f"Loss against {axis.label}", axis, curves, logarithmic=True)


def _training_chart(runs: Sequence[Run], name: str, title: str, key: str, **look: bool) -> Chart:
    curves = [curve for i, run in enumerate(runs) for curve in _curve(i, run.label, run.rows, STEPS, key)]
    return Chart(name, title, STEPS, curves, **look)


def _difference_chart(runs: Sequence[Run]) -> Chart:
    """Return a chart of loss differences: each run's training loss minus that of the first run, at common steps."""
    reference = {row["step"]: row["loss"] for row in runs[0].rows if row.get("loss") is not None}
    curves = []
    for i, run in enumerate(runs[1:], start=1):
        rows = [
            {"step": row["step"], "difference": row["loss"] - reference[row["step"]]}
            for row in run.rows
            if row["step"] in reference and row.get("loss") is not None
        ]
        curves += _curve(i, run.label, rows, STEPS, "difference")
    return Chart("loss_difference", "Training loss \N{MINUS SIGN} loss of the first run", STEPS, curves)


def _curve(run: int, label: str, rows: Sequence[Row], axis: Axis, key: str, **look: bool) -> list[Curve]:
    """Return a list with the curve of a key, or an empty list if there are no values."""
    points = thin_out(
        [
            (row[axis.key] / axis.unit, row[key])
            for row in rows
            if row.get(axis.key) is not None and row.get(key) is not None
        ]
    )
    return [Curve(run, label, [x for x, _ in points], [y for _, y in points], **look)] if points else []


def thin_out(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return at most ``MOST_POINTS`` points of a curve.

    A curve with more points is divided into ranges with equal numbers of points. The result contains the lowest and the
    highest point of each range.
    """
    if len(points) <= MOST_POINTS:
        return points
    ranges = MOST_POINTS // 2
    kept = []
    for i in range(ranges):
        start, stop = (j * len(points) // ranges for j in (i, i + 1))
        by_height = sorted(range(start, stop), key=lambda index: points[index][1])
        kept += [points[index] for index in sorted({by_height[0], by_height[-1]})]
    return kept
