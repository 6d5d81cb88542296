"""Judge whether each finished step was good, was skipped, or is a spike. Stop the run after too many bad steps."""

import logging
import math
import statistics
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import Enum

from pipeline.checkpoint.state import GuardState
from pipeline.config.schema import GuardConfig
from pipeline.distributed.device import LateValue
from pipeline.errors import TrainingError

log = logging.getLogger(__name__)

#: The least standard deviation of a window as a fraction of its mean, so that rounding does not look like a spike.
_LEAST_RELATIVE_SPREAD = 1e-3


class Verdict(Enum):
    """The judgment of ``StepGuard`` on a finished step."""

    GOOD = "good"
    SKIPPED = "skipped"  # the update was not applied
    SPIKE = "spike"


@dataclass(frozen=True)
class TrainedStep:
    """An optimizer step. The device may still be computing the loss and the gradient norm of this step."""

    step: int
    first_sample: int
    stop_sample: int
    loss: LateValue  # the mean loss of the global batch; NaN if no target is scored
    grad_norm: LateValue  # global, unscaled, before clipping
    loss_scale: float
    learning_rate: float
    scored_targets: LateValue  # of the global batch


@dataclass(frozen=True)
class FinishedStep:
    """The values from which ``StepGuard`` judges a step, the same on every rank."""

    step: int
    first_sample: int
    stop_sample: int
    grad_norm: float
    loss_scale: float  # the factor by which the loss was multiplied
    loss: float | None  # of the global batch; None if the run does not watch for spikes
    scored_targets: int  # of the global batch; if 0, the loss is NaN and the gradients are zero

    def __str__(self) -> str:
        loss = "" if self.loss is None else f"loss {self.loss:.4g}, "
        samples = f"samples {self.first_sample} to {self.stop_sample - 1}"
        return f"step {self.step}: {loss}gradient norm {self.grad_norm:.4g} ({samples})"


class StepGuard:
    """Judges each step of a run, in order: the step is good, was skipped, or is a spike.

    A skipped step had gradients that are not finite. A spike has a much higher loss or gradient norm than the steps
    before it. All ranks reach the same verdicts.
    """

    def __init__(self, config: GuardConfig, state: GuardState) -> None:
        self.config = config
        self.state = state
        self._queue: deque[TrainedStep] = deque()
        self._steps_without_targets = 0  # since this start of the run

    def enqueue(self, trained: TrainedStep) -> None:
        """Add a step to the queue of steps that the guard will judge."""
        self._queue.append(trained)

    def judge_queued(self, *, leave: int = 0) -> Iterator[tuple[FinishedStep, Verdict]]:
        """Judge all queued steps except the newest ``leave`` steps. Yield (step, verdict), the oldest step first."""
        while len(self._queue) > leave:
            queued = self._queue.popleft()
            loss = None if self.config.spike_zscore is None else queued.loss.read()
            grad_norm = queued.grad_norm.read()
            finished = FinishedStep(
                queued.step,
                queued.first_sample,
                queued.stop_sample,
                grad_norm,
                queued.loss_scale,
                loss,
                int(queued.scored_targets.read()),
            )
            yield finished, self.judge(finished)

    def judge(self, finished: FinishedStep) -> Verdict:
        """Judge a finished step, update the state of the guard, and return the verdict.

        Raises:
            TrainingError: too many steps in a row were skipped, or the step is a spike and no rollback is left.
        """
        if not finished.scored_targets:
            self._count_without_targets(finished)
        if not math.isfinite(finished.grad_norm):
            self._count_skipped(finished)
            return Verdict.SKIPPED
        self.state = replace(self.state, bad_in_a_row=0)
        if self.config.spike_zscore is None or finished.loss is None or not finished.scored_targets:
            return Verdict.GOOD
        if spike := self._describe_spike(finished):
            if self.state.rollbacks >= self.config.max_rollbacks:
                raise TrainingError(
                    f"{finished}: {spike}, after {self.state.rollbacks} rollbacks; the run has stopped, "
                    "its checkpoints are intact; lower optimizer.learning_rate, "
                    "or raise guard.max_rollbacks or guard.spike_zscore"
                )
            log.warning("%s: %s", finished, spike)
            return Verdict.SPIKE
        recent = (*self.state.recent, (finished.loss, finished.grad_norm))[-self.config.spike_window :]
        self.state = replace(self.state, recent=recent)
        return Verdict.GOOD

    def after_rollback(self, stored: GuardState, spike: FinishedStep) -> None:
        """Restore the state of the guard, after a spike has made the run go back to a checkpoint.

        Args:
            stored: the state of the guard in this checkpoint.
            spike: the step that was a spike. The run will not train on the samples of this step again.
        """
        self._queue.clear()
        self.state = replace(
            stored,
            rollbacks=self.state.rollbacks + 1,
            skipped_samples=(*self.state.skipped_samples, (spike.first_sample, spike.stop_sample)),
        )

    def next_sample(self, consumed: int, samples_per_step: int) -> int:
        """Return the index of the first sample of the next step, in the order of training.

        Usually, the result is ``consumed``. If the step would contain samples of an earlier spike, the result is the
        first sample after them.

        Args:
            consumed: the index of the first sample after the previous step.
        """
        first = consumed
        for start, stop in sorted(self.state.skipped_samples):
            if first < stop and start < first + samples_per_step:
                first = stop
        return first

    def _count_without_targets(self, finished: FinishedStep) -> None:
        self._steps_without_targets += 1
        if self._steps_without_targets == 1:
            samples = f"samples {finished.first_sample} to {finished.stop_sample - 1}"
            log.warning("step %d: none of its targets is scored (%s): its loss is null", finished.step, samples)

    def log_steps_without_targets(self) -> None:
        """Log how many steps of this process had no scored target. If there are no such steps, log nothing."""
        if count := self._steps_without_targets:
            log.warning("steps without a scored target since this start: %d; their loss is null", count)

    def _count_skipped(self, finished: FinishedStep) -> None:
        log.warning("%s: not finite, the step is skipped", finished)
        if finished.loss_scale > 1:  # fp16 lowers its loss scale when gradients overflow
            return
        in_a_row = self.state.bad_in_a_row + 1
        self.state = replace(self.state, bad_in_a_row=in_a_row)
        if in_a_row >= self.config.max_bad_steps:
            raise TrainingError(
                f"{finished}: {in_a_row} steps in a row were not finite; the run has stopped, its checkpoints are "
                "intact; lower optimizer.learning_rate, raise schedule.warmup_steps, or raise guard.max_bad_steps"
            )

    def _describe_spike(self, finished: FinishedStep) -> str | None:
        threshold = self.config.spike_zscore
        assert threshold is not None and finished.loss is not None
        if len(self.state.recent) < self.config.spike_window:
            return None
        losses, norms = zip(*self.state.recent, strict=True)
        for what, value, window in (("loss", finished.loss, losses), ("gradient norm", finished.grad_norm, norms)):
            zscore = z_score(value, window)
            if not zscore <= threshold:
                return f"its {what} is {zscore:.1f} standard deviations above the last {len(window)} steps"
        return None


def z_score(value: float, window: tuple[float, ...]) -> float:
    """Return how many standard deviations ``value`` is above the mean of ``window``.

    If ``value`` is NaN, the result is NaN.
    """
    mean = statistics.fmean(window)
    spread = max(statistics.pstdev(window, mean), abs(mean) * _LEAST_RELATIVE_SPREAD)
    return (value - mean) / (spread or math.ulp(0.0))  # infinite if the window is all zeros
