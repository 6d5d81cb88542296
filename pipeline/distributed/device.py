"""Describe a device: its name, its memory, the speed of matrix products, and whether torch.compile works."""

import logging
import math
import platform
import resource
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from pipeline.distributed.environment import set_allocator_default

log = logging.getLogger(__name__)

GIB = 1 << 30

#: (m, k, n): the sizes of a product of an (m, k) matrix and a (k, n) matrix.
ProductShape = tuple[int, int, int]

CEILING_SECONDS = 0.6
_CEILING_SQUARES = {"cuda": (8192,), "mps": (2048,), "cpu": (1024, 1536, 2048)}
_CEILING_ROUNDS = 3
_NOISE_NUMBERS = 65_537  # a prime, so that the rows of a matrix differ
_SMALL_SQUARE, _SMALL_REPEATS = 256, 8  # under a second on any CPU, for any dtype
_LONGEST_PRODUCT = 0.2  # the largest share of the measurement's time that one product may take on a CPU


def configure_allocator() -> None:
    """Make torch allocate GPU memory in segments that can grow, unless the user has set allocator options.

    Call this function before the first allocation on a GPU. In segments that cannot grow, freed blocks are often too
    small for the next tensor.
    """
    set_allocator_default("expandable_segments:True")


def matmul_dtype(precision: str) -> torch.dtype:
    """Return the dtype of matrix products for a value of ``run.precision``."""
    return {"fp32": torch.float32, "amp_fp16": torch.float16}.get(precision, torch.bfloat16)


def describe_fp32_products(precision: str, device: torch.device) -> str:
    """Return a text for the log that says whether fp32 products on a GPU use TF32.

    If ``precision`` is not fp32 or the device is not a GPU, the text is empty.
    """
    if device.type != "cuda" or precision != "fp32":
        return ""
    if torch.get_float32_matmul_precision() != "highest":
        return "; matrix products with TF32, which rounds their inputs to 10 bits"
    return "; matrix products without TF32: exact, and several times slower than amp_bf16"


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
    # The first round warms up. Other programs can make a round slower, so the fastest round counts.
    return max(product.measure(slice_s) for _ in range(_CEILING_ROUNDS) for product in products)


def _short_products(shapes: Sequence[ProductShape], dtype: torch.dtype, longest_s: float) -> list[ProductShape]:
    """Return the shapes whose product takes at most ``longest_s`` seconds on this CPU.

    If there are none, return one small shape.
    """
    small = (_SMALL_SQUARE,) * 3
    product = _Product(small, dtype, torch.device("cpu"))
    flops_per_s = max(product.measure(0.0) for _ in range(_SMALL_REPEATS))
    return [shape for shape in shapes if 2 * math.prod(shape) / flops_per_s <= longest_s] or [small]


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


def summing_dtype(device: torch.device) -> torch.dtype:
    """Return the dtype for sums of many numbers: fp64, or fp32 on MPS."""
    return torch.float32 if device.type == "mps" else torch.float64


def device_name(device: torch.device) -> str:
    """Return the product name of a GPU, or the type and the architecture of another device."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({platform.machine()})"


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished all queued work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def copy_to(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor from host memory to a device, without waiting for queued work on a GPU."""
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


class LateValue:
    """A number that is copied from the device to the host in the background."""

    def __init__(self, value: Tensor | float) -> None:
        self._value = value
        self._copied: torch.cuda.Event | None = None
        if isinstance(value, Tensor) and value.is_cuda:
            self._value = torch.empty((), dtype=value.dtype, pin_memory=True).copy_(value, non_blocking=True)
            self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._copied.record()

    def read(self) -> float:
        """Wait until the number is on the host, and return it.

        The call does not wait for work that was queued after this object was created.
        """
        if self._copied is not None:
            self._copied.synchronize()
        return float(self._value)


class PeakMemory:
    """The peak memory of this process.

    On a GPU, this is the peak since this object was created. On a CPU, this is the peak since the process started.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._earlier_bytes = 0  # the peak before the last block in ``ignored``
        self._forget()

    def read(self) -> int:
        """Return the peak memory of this process in bytes."""
        return max(self._earlier_bytes, peak_memory_bytes(self._device))

    @contextmanager
    def ignored(self) -> Iterator[None]:
        """Return a context manager. On a GPU, allocations inside its block do not count in the peak."""
        self._earlier_bytes = self.read()
        yield
        self._forget()

    def _forget(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)


def peak_memory_bytes(device: torch.device) -> int:
    """Return the peak memory of this process in bytes: allocated memory on a GPU, resident memory on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if device.type == "mps":
        return torch.mps.driver_allocated_memory()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def compiler_works(device: torch.device) -> bool:
    """Return whether ``torch.compile`` works on the device. If not, log the reason."""
    try:
        torch.compile(lambda x: x * 2 + 1)(torch.ones(8, device=device))
    except Exception as error:  # noqa: BLE001 - the toolchain may raise anything
        reason = " ".join(str(error).split())[:160]
        log.warning("torch.compile does not work here, running without it: %s", reason)
        return False
    return True
