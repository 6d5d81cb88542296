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
from pipeline.errors import TrainingError
from pipeline.hardware.device import LateValue

log = logging.getLogger(__name__)

#: The least standard deviation of a window as a fraction of its mean, so that rounding does not look like a spike.
_LEAST_RELATIVE_SPREAD = 1e-3


class StepVerdict(Enum):
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
    loss_scale: float  # the factor by which the loss was multiplied
    learning_rate: float
    scored_targets: LateValue  # of the global batch; if 0, the gradients are zero

    def describe_samples(self) -> str:
        """Return a text that names the first and the last sample."""
        return f"samples {self.first_sample} to {self.stop_sample - 1}"


class StepGuard:
    """Judges each step of a run, in order: the step is good, was skipped, or is a spike.

    A skipped step had gradients that are not finite. A spike has a much higher loss or gradient norm than the steps
    before it. All ranks see the same values, and reach the same verdicts.
    """

    def __init__(self, config: GuardConfig, state: GuardState) -> None:
        self.config = config
        self.state = state
        self._queue: deque[TrainedStep] = deque()
        self._steps_without_targets = 0  # since this start of the run

    def enqueue(self, trained: TrainedStep) -> None:
        """Add a step to the queue of steps that the guard will judge."""
        self._queue.append(trained)

    def judge_queued(self, *, leave: int = 0) -> Iterator[tuple[TrainedStep, StepVerdict]]:
        """Judge all queued steps except the newest ``leave`` steps. Yield (step, verdict), the oldest step first."""
        while len(self._queue) > leave:
            trained = self._queue.popleft()
            yield trained, self.judge(trained)

    def judge(self, trained: TrainedStep) -> StepVerdict:
        """Wait until the device has finished a step, judge it, update the state of the guard, and return the verdict.

        Raises:
            TrainingError: too many steps in a row were skipped, or the step is a spike and no rollback is left.
        """
        has_targets, grad_norm = trained.scored_targets.read() > 0, trained.grad_norm.read()
        if not has_targets:
            self._count_without_targets(trained)
        if not math.isfinite(grad_norm):
            self._count_skipped(trained)
            return StepVerdict.SKIPPED
        self.state = replace(self.state, bad_in_a_row=0)
        if self.config.spike_zscore is None or not has_targets:
            return StepVerdict.GOOD
        loss = trained.loss.read()
        if spike := self._describe_spike(loss, grad_norm, self.config.spike_zscore):
            if self.state.rollbacks >= self.config.max_rollbacks:
                raise TrainingError(
                    f"{self._describe(trained)}: {spike}, after {self.state.rollbacks} rollbacks; the run has stopped, "
                    "its checkpoints are intact; lower optimizer.learning_rate, "
                    "or raise guard.max_rollbacks or guard.spike_zscore"
                )
            log.warning("%s: %s", self._describe(trained), spike)
            return StepVerdict.SPIKE
        recent = (*self.state.recent, (loss, grad_norm))[-self.config.spike_window :]
        self.state = replace(self.state, recent=recent)
        return StepVerdict.GOOD

    def after_rollback(self, stored: GuardState, spike: TrainedStep) -> None:
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

    def _count_without_targets(self, trained: TrainedStep) -> None:
        self._steps_without_targets += 1
        if self._steps_without_targets == 1:
            samples = trained.describe_samples()
            log.warning("step %d: none of its targets is scored (%s): its loss is null", trained.step, samples)

    def log_steps_without_targets(self) -> None:
        """Log how many steps of this process had no scored target. If there are no such steps, log nothing."""
        if count := self._steps_without_targets:
            log.warning("steps without a scored target since this start: %d; their loss is null", count)

    def _describe(self, trained: TrainedStep) -> str:
        loss = "" if self.config.spike_zscore is None else f"loss {trained.loss.read():.4g}, "
        return f"step {trained.step}: {loss}gradient norm {trained.grad_norm.read():.4g} ({trained.describe_samples()})"

    def _count_skipped(self, trained: TrainedStep) -> None:
        log.warning("%s: not finite, the step is skipped", self._describe(trained))
        if trained.loss_scale > 1:  # fp16 lowers its loss scale when gradients overflow
            return
        in_a_row = self.state.bad_in_a_row + 1
        self.state = replace(self.state, bad_in_a_row=in_a_row)
        if in_a_row >= self.config.max_bad_steps:
            raise TrainingError(
                f"{self._describe(trained)}: {in_a_row} steps in a row were not finite; the run has stopped, its "
                "checkpoints are intact; lower optimizer.learning_rate, raise schedule.warmup_steps, or raise "
                "guard.max_bad_steps"
            )

    def _describe_spike(self, loss: float, grad_norm: float, threshold: float) -> str | None:
        if len(self.state.recent) < self.config.spike_window:
            return None
        losses, norms = zip(*self.state.recent, strict=True)
        for what, value, window in (("loss", loss, losses), ("gradient norm", grad_norm, norms)):
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
