"""Measure the highest speed of matrix products, with which the speed of training is compared (MFU)."""

import math
import time
from collections.abc import Sequence
from operator import itemgetter

import torch
from torch import Tensor

from pipeline.hardware.device import matmul_dtype, synchronize

#: (m, k, n): the sizes of a product of an (m, k) matrix and a (k, n) matrix.
ProductShape = tuple[int, int, int]

CEILING_SECONDS = 0.6
_CEILING_SQUARES = {"cuda": (8192,), "mps": (2048,), "cpu": (1024, 1536, 2048)}
_CEILING_ROUNDS = 3
_NOISE_NUMBERS = 65_537  # a prime, so that the rows of a matrix differ
_SMALL, _SMALL_REPEATS = (256, 256, 256), 8  # under a second on any CPU, for any dtype
#: A precision is worth changing on a CPU if this makes matrix products at least this much faster.
WORTHWHILE_SPEEDUP = 1.5
_LONGEST_PRODUCT = 0.2  # the largest share of the measurement's time that one product may take on a CPU


def measure_matmul_ceiling(
    device: torch.device,
    dtype: torch.dtype,
    shapes: Sequence[ProductShape] = (),
    seconds: float = CEILING_SECONDS,
) -> float:
    """Measure the FLOP/s of matrix products on one rank. Return the speed of the fastest shape.

    Args:
        shapes: additional shapes to measure on a CPU, because the fastest shape differs from CPU to CPU.
        seconds: about how long the measurement takes.
    """
    candidates = [(n, n, n) for n in _CEILING_SQUARES[device.type]]
    if device.type == "cpu":
        candidates = _short_products([*candidates, *shapes], dtype, _LONGEST_PRODUCT * seconds)
    products = [_Product(shape, dtype, device) for shape in dict.fromkeys(candidates)]
    slice_s = seconds / (_CEILING_ROUNDS * len(products))
    for product in products:
        product.measure(0.0)  # warms up
    flops, fastest = max(((product.measure(slice_s), product) for product in products), key=itemgetter(0))
    return max(flops, fastest.measure(slice_s))  # other programs may have made the first measurement slower


def describe_slow_precision(precision: str, device: torch.device, setting: str = "run.precision=") -> str | None:
    """Return a warning if a CPU is faster in fp32 than in a precision with 16-bit products, or None.

    A CPU without 16-bit matrix units converts each number. The measurement takes a few milliseconds, or up to a
    second on such a CPU.

    Args:
        precision: a value of ``run.precision``.
        setting: the key or option that sets the precision, as it is written before the value.
    """
    dtype = matmul_dtype(precision)
    if device.type != "cpu" or dtype == torch.float32:
        return None
    speedup = _fp32_speedup(dtype)
    if speedup < WORTHWHILE_SPEEDUP:
        return None
    return (
        f"{setting}{precision} is slow on this CPU: matrix products in fp32 are {speedup:.2g} times as fast; "
        f"set {setting}fp32"
    )


def _fp32_speedup(dtype: torch.dtype) -> float:
    """Return the speed of a small fp32 product on this CPU, divided by the speed of the same product in ``dtype``.

    The number of threads stays as it is: a change to one thread and back made the later training 6% slower.
    """
    speedup = _measure_small(torch.float32) / _measure_small(dtype)
    if speedup < WORTHWHILE_SPEEDUP:
        return speedup
    # Other programs may have disturbed the measurement.
    return min(speedup, _measure_small(torch.float32) / _measure_small(dtype))


def _measure_small(dtype: torch.dtype) -> float:
    """Return the FLOP/s of a small product on this CPU: those of the fastest repetition, the least disturbed one."""
    product = _Product(_SMALL, dtype, torch.device("cpu"))
    return max(product.measure(0.0) for _ in range(_SMALL_REPEATS))


def _short_products(shapes: Sequence[ProductShape], dtype: torch.dtype, longest_s: float) -> list[ProductShape]:
    """Return the shapes whose product takes at most ``longest_s`` seconds on this CPU.

    If there are none, return one small shape.
    """
    flops_per_s = _measure_small(dtype)
    return [shape for shape in shapes if 2 * math.prod(shape) / flops_per_s <= longest_s] or [_SMALL]


def _noise(rows: int, columns: int, device: torch.device) -> Tensor:
    """Return a matrix of normally distributed numbers that repeat, because torch draws with one thread on a CPU."""
    numbers = torch.randn(_NOISE_NUMBERS, device=device)
    return numbers.repeat(-(-rows * columns // _NOISE_NUMBERS))[: rows * columns].view(rows, columns)


class _Product:
    """A matrix product whose result is always written to the same memory."""

    def __init__(self, shape: ProductShape, dtype: torch.dtype, device: torch.device) -> None:
        m, k, n = shape
        self._flops = 2 * m * k * n
        self._a = _noise(m, k, device).to(dtype)
        self._b = _noise(k, n, device).to(dtype)
        self._result = torch.empty(m, n, device=device, dtype=dtype)

    def measure(self, seconds: float) -> float:
        """Repeat the product for this number of seconds, at least once. Return the FLOP/s."""
        repeats, elapsed, start = 0, 0.0, time.perf_counter()
        while repeats == 0 or elapsed < seconds:
            torch.mm(self._a, self._b, out=self._result)
            synchronize(self._result.device)
            repeats, elapsed = repeats + 1, time.perf_counter() - start
        return repeats * self._flops / elapsed
