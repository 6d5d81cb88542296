"""Measure tokens per second and model FLOPs utilization (MFU). Evaluations and checkpoints do not count."""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager

from pipeline.config.schema import Config
from pipeline.distributed.device import matmul_dtype
from pipeline.distributed.matmul_ceiling import ProductShape, measure_matmul_ceiling
from pipeline.distributed.world import World

log = logging.getLogger(__name__)

_NOTABLE_INCREASE = 1.05
_CEILING_SECONDS = 0.2  # short, because a run measures the ceiling at its start and at each evaluation
MOST_ROWS = 4096  # of a measured product; enough for the threads of a large CPU


def measure_ceiling(world: World, config: Config, seconds: float = _CEILING_SECONDS) -> float:
    """Measure the FLOP/s of all ranks together in matrix products with the run's dtype.

    Every rank must call this.

    Args:
        seconds: about how long the measurement takes.
    """
    shapes = layer_products(config)
    world.gather(None)  # all ranks must measure at the same time, because they share the cores of a CPU
    return sum(world.gather(measure_matmul_ceiling(world.device, matmul_dtype(config.run.precision), shapes, seconds)))


def layer_products(config: Config) -> list[ProductShape]:
    """Return the shape of each product of an input and a weight in a block's forward pass.

    The input has the tokens of a micro-batch as rows, but at most ``MOST_ROWS``.
    """
    m, C = min(config.batch.micro_batch_size * config.seq_len, MOST_ROWS), config.model.n_embd
    return [(m, C, 3 * C), (m, C, C), (m, C, 4 * C), (m, 4 * C, C)]


class ThroughputMeter:
    """Measures the time per step since the last call of ``read``. Evaluations and checkpoints do not count.

    Args:
        tokens_per_step: the number of tokens of all ranks together.
        flops_per_token: the FLOPs of a forward and backward pass.
        ceiling_flops: the measured FLOP/s of all ranks together in matrix products.
    """

    def __init__(self, tokens_per_step: int, flops_per_token: int, ceiling_flops: float) -> None:
        self.tokens_per_step = tokens_per_step
        self.flops_per_token = flops_per_token
        self.ceiling_flops = ceiling_flops
        self.restart()

    def raise_ceiling(self, flops: float) -> None:
        """Use a new measurement of ``ceiling_flops`` if it is the highest so far.

        Other programs on the machine can make a measurement too low, but never too high.
        """
        if flops > _NOTABLE_INCREASE * self.ceiling_flops:
            log.info("ceiling   %.3g FLOP/s, measured again (%.3g before)", flops, self.ceiling_flops)
        self.ceiling_flops = max(self.ceiling_flops, flops)

    def restart(self) -> None:
        """Start a new measurement now."""
        self._started, self._steps, self._waited_s = time.perf_counter(), 0, 0.0

    def count_step(self) -> None:
        """Count an optimizer step that was queued on the device."""
        self._steps += 1

    def read(self) -> dict[str, float]:
        """Return metrics such as ``tokens_per_s`` since the last call. The caller must first synchronize the device."""
        now = time.perf_counter()
        seconds = (now - self._started) / self._steps
        tokens_per_s = self.tokens_per_step / seconds
        waited_share = self._waited_s / (now - self._started)
        self.restart()
        self.raise_ceiling(tokens_per_s * self.flops_per_token)  # training cannot be faster than the ceiling
        return {
            "tokens_per_s": tokens_per_s,
            "step_ms": seconds * 1e3,
            "mfu": tokens_per_s * self.flops_per_token / self.ceiling_flops,
            "data_wait_share": waited_share,
        }

    @contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        """Return a context manager. The time inside its block counts as waiting for data."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self._waited_s += time.perf_counter() - started

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Return a context manager that stops the clock during its block."""
        stopped = time.perf_counter()
        try:
            yield
        finally:
            self._started += time.perf_counter() - stopped
