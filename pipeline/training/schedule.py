"""The learning rate as a pure function of the step: linear warm-up, then cosine decay."""

import math

from pipeline.config.schema import OptimizerConfig, ScheduleConfig


def lr_at(step: int, optimizer: OptimizerConfig, schedule: ScheduleConfig) -> float:
    """Return the learning rate of the next optimizer step after ``step`` finished steps.

    The rate rises linearly to the peak over ``warmup_steps`` steps; the first step already has a rate above zero. Then
    it falls along half a cosine to ``min_lr_ratio`` of the peak at ``max_steps`` (Loshchilov and Hutter 2017, without
    restarts). The last step of a run, ``lr_at(max_steps - 1)``, is slightly above that floor.
    """
    peak = optimizer.learning_rate
    if step < schedule.warmup_steps:
        return peak * (step + 1) / schedule.warmup_steps
    floor = peak * schedule.min_lr_ratio
    if step >= schedule.max_steps:
        return floor
    progress = (step - schedule.warmup_steps) / (schedule.max_steps - schedule.warmup_steps)
    return floor + (peak - floor) * 0.5 * (1.0 + math.cos(math.pi * progress))
