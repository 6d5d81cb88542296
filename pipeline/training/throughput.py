"""Tokens per second and model-FLOPs utilisation over the time that is really spent training."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class ThroughputMeter:
    """Counts steps since the last reading; validation and checkpoints stand outside the clock.

    Args:
        tokens_per_step: over all ranks.
        flops_per_token: of the model, forward and backward.
        ceiling_flops: matrix FLOP/s that all ranks together can reach.
    """

    def __init__(self, tokens_per_step: int, flops_per_token: int, ceiling_flops: float) -> None:
        self.tokens_per_step = tokens_per_step
        self.flops_per_token = flops_per_token
        self.ceiling_flops = ceiling_flops
        self.restart()

    @property
    def ideal_step_s(self) -> float:
        """How long a step would take at the ceiling."""
        return self.tokens_per_step * self.flops_per_token / self.ceiling_flops

    def restart(self) -> None:
        """Start the clock anew, right before the first step."""
        self._started, self._steps, self._waited_s = time.perf_counter(), 0, 0.0

    def count_step(self) -> None:
        """One more optimizer step was queued."""
        self._steps += 1

    def read(self) -> dict[str, float]:
        """Rates since the last reading, as metrics; the caller has waited for the device."""
        now = time.perf_counter()
        seconds = (now - self._started) / self._steps
        tokens_per_s = self.tokens_per_step / seconds
        waited_share = self._waited_s / (now - self._started)
        self._started, self._steps, self._waited_s = now, 0, 0.0
        return {
            "tokens_per_s": tokens_per_s,
            "step_ms": seconds * 1e3,
            "mfu": tokens_per_s * self.flops_per_token / self.ceiling_flops,
            "data_wait_share": waited_share,
        }

    @contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        """Count the block as time that training waits for its next batch."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self._waited_s += time.perf_counter() - started

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Stop the clock for what is not training."""
        stopped = time.perf_counter()
        try:
            yield
        finally:
            self._started += time.perf_counter() - stopped
