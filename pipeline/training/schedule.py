"""The learning rate as a pure function of the step: linear warm-up, then cosine."""

from __future__ import annotations

import math

from pipeline.config.schema import OptimizerConfig, ScheduleConfig


def lr_at(step: int, optimizer: OptimizerConfig, schedule: ScheduleConfig) -> float:
    """The learning rate of the update that follows ``step`` finished ones.

    It rises linearly to the peak over ``warmup_steps`` updates (the first is already above zero),
    then falls on half a cosine to ``min_lr_ratio`` of the peak at ``max_steps`` (Loshchilov and
    Hutter 2017, without restarts), and stays there.

    Args:
        step: finished optimizer steps, from 0.
    """
    peak = optimizer.learning_rate
    if step < schedule.warmup_steps:
        return peak * (step + 1) / schedule.warmup_steps
    floor = peak * schedule.min_lr_ratio
    if step >= schedule.max_steps:
        return floor
    progress = (step - schedule.warmup_steps) / (schedule.max_steps - schedule.warmup_steps)
    return floor + (peak - floor) * 0.5 * (1.0 + math.cos(math.pi * progress))
