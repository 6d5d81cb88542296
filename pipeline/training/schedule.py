"""Compute the learning rate of a step, and the decay of the weights' moving average."""

import math
from collections.abc import Callable

from pipeline.config.schema import AveragingConfig, Config, OptimizerConfig, ScheduleConfig

CHART_ROWS = 20
CHART_COLUMNS = 50  # the length of the bar at the peak learning rate


def lr_at(step: int, optimizer: OptimizerConfig, schedule: ScheduleConfig) -> float:
    """Return the learning rate of the optimizer step that comes after ``step`` finished steps.

    The rate rises linearly to its peak for ``warmup_steps`` steps. In the decay, it falls to the minimum, which is
    ``min_lr_ratio`` times the peak.

    - ``wsd``: the first step of the decay is below the peak. The last step of the run is at the minimum.
    - ``cosine`` and ``linear``: the first step of the decay is at the peak. The last step of the run is above the
      minimum (Loshchilov and Hutter 2017).
    """
    share_above_floor = _share_above_floor(schedule)  # first, so that a missing formula fails in the first step
    peak = optimizer.learning_rate
    if step < schedule.warmup_steps:
        return peak * (step + 1) / schedule.warmup_steps
    if step < schedule.decay_start or schedule.name == "constant":
        return peak
    floor = peak * schedule.min_lr_ratio
    if step >= schedule.max_steps:
        return floor
    decayed = step - schedule.decay_start + (schedule.name == "wsd")
    progress = decayed / (schedule.max_steps - schedule.decay_start)
    return floor + (peak - floor) * share_above_floor(progress)


def _share_above_floor(schedule: ScheduleConfig) -> Callable[[float], float]:
    """Return the formula of the decay's curve.

    The formula maps the progress of the decay, from 0 to 1, to (rate - minimum) / (peak - minimum).

    - ``cosine``: Loshchilov and Hutter 2017, without restarts.
    - ``1-sqrt``: Hägele et al. 2024.
    """
    formulas: dict[str, Callable[[float], float]] = {
        "constant": lambda progress: 1.0,
        "linear": lambda progress: 1.0 - progress,
        "cosine": lambda progress: 0.5 * (1.0 + math.cos(math.pi * progress)),
        "1-sqrt": lambda progress: 1.0 - math.sqrt(progress),
    }
    return formulas[(schedule.decay_shape or "linear") if schedule.name == "wsd" else schedule.name]


def ema_decay_at(step: int, averaging: AveragingConfig) -> float | None:
    """Return the decay of the weights' moving average in the next step. If ``averaging.ema`` is None, return None.

    The decay is smaller at the beginning of a run, so that the average soon forgets the initial weights. The formula is
    that of TensorFlow's ``ExponentialMovingAverage``.

    Args:
        step: the number of finished steps.
    """
    return None if averaging.ema is None else min(averaging.ema, (1 + step) / (10 + step))


def format_schedule(config: Config) -> str:
    """Return a description of the schedule and a bar chart of the learning rate, as text.

    The chart has one line for each of several equally spaced steps. The end of the warm-up and the start of the decay
    also have a line.
    """
    schedule = config.schedule
    spread = {schedule.max_steps * row // CHART_ROWS for row in range(CHART_ROWS + 1)}
    corners = {schedule.warmup_steps, schedule.decay_start}
    lines = [f"schedule {schedule}", "", f"{'step':>12}{'tokens':>20}{'learning rate':>16}"]
    for step in sorted(spread | corners):
        rate = lr_at(step, config.optimizer, schedule)
        bar = "#" * round(CHART_COLUMNS * rate / config.optimizer.learning_rate)
        lines.append(f"{step:12,}{step * config.batch.tokens_per_step:20,}{rate:16.2e}  {bar}".rstrip())
    return "\n".join(lines)
