"""Judges finished steps: skipped ones, too many of them in a row, and spikes in loss or gradient norm."""

from __future__ import annotations

import logging
import math
import statistics
from dataclasses import dataclass, replace
from enum import Enum

from pipeline.checkpoint.folder import GuardState
from pipeline.config.schema import GuardConfig
from pipeline.errors import TrainingError

log = logging.getLogger(__name__)

#: Spread below which a window counts as flat, relative to its mean: rounding alone must not look like a spike.
_LEAST_RELATIVE_SPREAD = 1e-3


class Verdict(Enum):
    """What to do about a step."""

    GOOD = "good"
    SKIPPED = "skipped"  # its update was not applied
    SPIKE = "spike"


@dataclass(frozen=True)
class FinishedStep:
    """The numbers by which a step is judged, the same on every rank."""

    step: int
    first_sample: int
    stop_sample: int
    grad_norm: float
    loss_scale: float  # that its gradients were computed with
    loss: float | None  # of the global batch; None where no spikes are looked for

    def __str__(self) -> str:
        loss = "" if self.loss is None else f"loss {self.loss:.4g}, "
        samples = f"samples {self.first_sample} to {self.stop_sample - 1}"
        return f"step {self.step}: {loss}gradient norm {self.grad_norm:.4g} ({samples})"


class StepGuard:
    """Follows a run's steps in order. Every rank comes to the same verdicts."""

    def __init__(self, config: GuardConfig, state: GuardState) -> None:
        self.config = config
        self.state = state

    @property
    def watches_spikes(self) -> bool:
        """Whether verdicts need the loss of every step."""
        return self.config.spike_zscore is not None

    def judge(self, finished: FinishedStep) -> Verdict:
        """The verdict on a step; the state follows.

        Raises:
            TrainingError: too many steps in a row were skipped, or there were too many rollbacks.
        """
        if not math.isfinite(finished.grad_norm):
            self._count_bad(finished)
            return Verdict.SKIPPED
        self.state = replace(self.state, bad_in_a_row=0)
        if not self.watches_spikes:
            return Verdict.GOOD
        if spike := self._describe_spike(finished):
            self._expect_rollbacks_left(finished, spike)
            log.warning("%s: %s", finished, spike)
            return Verdict.SPIKE
        assert finished.loss is not None
        recent = (*self.state.recent, (finished.loss, finished.grad_norm))[-self.config.spike_window :]
        self.state = replace(self.state, recent=recent)
        return Verdict.GOOD

    def after_rollback(self, stored: GuardState, finished: FinishedStep) -> None:
        """Go on from a checkpoint's state, leaving out the samples of the step that spiked."""
        self.state = replace(
            stored,
            rollbacks=self.state.rollbacks + 1,
            skipped_samples=(*self.state.skipped_samples, (finished.first_sample, finished.stop_sample)),
        )

    def next_sample(self, consumed: int, samples_per_step: int) -> int:
        """Where the next step's samples begin: after ``consumed``, and after what is left out."""
        first = consumed
        for start, stop in sorted(self.state.skipped_samples):
            if first < stop and start < first + samples_per_step:
                first = stop
        return first

    def _count_bad(self, finished: FinishedStep) -> None:
        """A skip at a loss scale above 1 is how fp16 finds its scale, and does not count."""
        log.warning("%s: not finite, the step is skipped", finished)
        if finished.loss_scale > 1:
            return
        in_a_row = self.state.bad_in_a_row + 1
        self.state = replace(self.state, bad_in_a_row=in_a_row)
        if in_a_row >= self.config.max_bad_steps:
            raise TrainingError(
                f"{finished}: {in_a_row} steps in a row were not finite; stopped, the checkpoints so far are intact; "
                "lower optimizer.learning_rate, lengthen schedule.warmup_steps, or raise guard.max_bad_steps"
            )

    def _describe_spike(self, finished: FinishedStep) -> str | None:
        """Why a step is a spike, once the window is full; None: it is none."""
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

    def _expect_rollbacks_left(self, finished: FinishedStep, spike: str) -> None:
        if self.state.rollbacks >= self.config.max_rollbacks:
            raise TrainingError(
                f"{finished}: {spike}, after {self.state.rollbacks} rollbacks; stopped, the checkpoints so far are "
                "intact; lower optimizer.learning_rate, or raise guard.max_rollbacks or guard.spike_zscore"
            )


def z_score(value: float, window: tuple[float, ...]) -> float:
    """How many standard deviations ``value`` lies above the mean of ``window``; NaN for NaN."""
    mean = statistics.fmean(window)
    spread = max(statistics.pstdev(window, mean), abs(mean) * _LEAST_RELATIVE_SPREAD)
    return (value - mean) / spread if spread else math.inf if value > mean else 0.0
