"""Measure tokens per second and model FLOPs utilization (MFU). Evaluations and checkpoints do not count."""

import logging
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from pipeline.config.schema import Config
from pipeline.distributed.step_clock import HostClock, StreamClock, Wait, create_clock
from pipeline.distributed.world import World
from pipeline.hardware.device import matmul_dtype, synchronize
from pipeline.hardware.matmul_ceiling import ProductShape, measure_matmul_ceiling

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

    A GPU works after the host has queued the work. Therefore, the clock only starts, stops and is read after the device
    has finished all queued work. Otherwise, the time of training steps would count as the time of an evaluation.

    Args:
        tokens_per_step: the number of tokens of all ranks together.
        flops_per_token: the FLOPs of a forward and backward pass.
        ceiling_flops: the measured FLOP/s of all ranks together in matrix products.
        device: the device of this rank.
        clock: measures how long the device waits for data. If None, a clock for the device is created.
    """

    def __init__(
        self,
        tokens_per_step: int,
        flops_per_token: int,
        ceiling_flops: float,
        device: torch.device,
        clock: HostClock | StreamClock | None = None,
    ) -> None:
        self.tokens_per_step = tokens_per_step
        self.flops_per_token = flops_per_token
        self.ceiling_flops = ceiling_flops
        self._device = device
        self._fastest_flops = 0.0  # of training
        self._clock = clock or create_clock(device)
        self.restart()

    def raise_ceiling(self, flops: float) -> None:
        """Use a new measurement of ``ceiling_flops`` if it is the highest so far.

        Other programs on the machine can make a measurement too low, but never too high.
        """
        if flops > _NOTABLE_INCREASE * self.ceiling_flops:
            log.info("ceiling   %.3g FLOP/s, measured again (%.3g before)", flops, self.ceiling_flops)
        self.ceiling_flops = max(self.ceiling_flops, flops)

    def restart(self) -> None:
        """Wait for the device, and start a new measurement."""
        synchronize(self._device)
        self._started, self._steps, self._waited_s = time.perf_counter(), 0, 0.0
        self._waits: deque[Wait] = deque()  # the waits for data whose times are not known yet

    def count_step(self) -> None:
        """Count an optimizer step that was queued on the device."""
        self._steps += 1
        self._add_waits()

    def read(self) -> dict[str, float | None]:
        """Wait for the device, and return metrics such as ``tokens_per_s`` since the last call.

        ``mfu`` is None if the ceiling is too low (see ``_share_of_ceiling``).
        """
        synchronize(self._device)
        now = time.perf_counter()
        self._add_waits()
        seconds = (now - self._started) / self._steps
        tokens_per_s = self.tokens_per_step / seconds
        waited_share = self._waited_s / (now - self._started)
        self.restart()
        return {
            "tokens_per_s": tokens_per_s,
            "step_ms": seconds * 1e3,
            "mfu": self._share_of_ceiling(tokens_per_s * self.flops_per_token),
            "data_wait_share": waited_share,
        }

    def _share_of_ceiling(self, flops: float) -> float | None:
        """Return ``flops / ceiling_flops``, or None if training has been faster than the ceiling.

        Training cannot be faster than the true ceiling. The measured ceiling is then too low for any share of it.
        """
        was_too_low = self._fastest_flops > self.ceiling_flops
        self._fastest_flops = max(self._fastest_flops, flops)
        if self._fastest_flops <= self.ceiling_flops:
            return flops / self.ceiling_flops
        if not was_too_low:
            log.info(
                "ceiling   too low: training reached %.3g FLOP/s, and %.3g were measured, probably while other "
                "programs used the machine; mfu is null until a higher measurement",
                flops,
                self.ceiling_flops,
            )
        return None

    @contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        """Return a context manager. The time inside its block in which the device has no work counts as data wait."""
        start = self._clock.mark()
        yield
        self._waits.append((start, self._clock.mark()))

    def _add_waits(self) -> None:
        while self._waits and self._clock.has_passed(self._waits[0][1]):
            self._waited_s += self._clock.seconds(*self._waits.popleft())

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Return a context manager that stops the clock during its block.

        The device finishes the steps that are queued before the clock stops, and the work of the block before the clock
        continues.
        """
        synchronize(self._device)
        stopped = time.perf_counter()
        try:
            yield
            synchronize(self._device)  # not after an error: a collective that another rank has not joined never ends
        finally:
            self._started += time.perf_counter() - stopped
