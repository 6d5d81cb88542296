"""Read properties of a device: name, memory, speed of matrix products, and whether torch.compile works."""

import logging
import platform
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from pipeline.distributed.environment import set_allocator_default

log = logging.getLogger(__name__)

GIB = 1 << 30

_CEILING_SIZE = {"cuda": 8192, "mps": 2048, "cpu": 1024}
CEILING_SECONDS = 0.3
_CEILING_ROUNDS = 6


def configure_allocator() -> None:
    """Make torch allocate GPU memory in segments that can grow.

    Call this function before the first allocation on a GPU. Evaluation and generation use tensors of many sizes. With
    segments of fixed sizes, the memory of freed tensors is often too small for later tensors. If the user has already
    set options of torch's allocator, this call does nothing.
    """
    set_allocator_default("expandable_segments:True")


def matmul_dtype(precision: str) -> torch.dtype:
    """Return the dtype in which matrix products are computed if ``run.precision`` is ``precision``."""
    return {"fp32": torch.float32, "amp_fp16": torch.float16}.get(precision, torch.bfloat16)


def describe_fp32_products(precision: str, device: torch.device) -> str:
    """Return a text for the log that says how a GPU computes matrix products in fp32, with or without TF32.

    Returns "" if the device is not a GPU or the precision is not ``fp32``.
    """
    if device.type != "cuda" or precision != "fp32":
        return ""
    if torch.get_float32_matmul_precision() != "highest":
        return "; matrix products with TF32, which rounds their inputs to 10 bits"
    return "; matrix products without TF32: exact, and several times slower than amp_bf16"


def measure_matmul_ceiling(device: torch.device, dtype: torch.dtype, seconds: float = CEILING_SECONDS) -> float:
    """Measure the FLOP/s of large square matrix products on one rank. No model can reach more FLOP/s.

    Published values are not used, because the speed depends on the power limit and on the number of threads.
    """
    n = _CEILING_SIZE[device.type]
    if device.type == "cpu" and 64 * _seconds_of_product(n // 4, dtype) > CEILING_SECONDS:
        n //= 4  # the CPU has no instructions for the dtype: a large product takes seconds and is not faster per FLOP
    a = torch.randn(n, n, device=device).to(dtype)
    b = torch.randn(n, n, device=device).to(dtype)
    best = 0.0
    for _ in range(_CEILING_ROUNDS):  # the first round warms up, and other programs disturb some of the others
        repeats, start = 0, time.perf_counter()
        while (elapsed := time.perf_counter() - start) < seconds / _CEILING_ROUNDS:
            torch.mm(a, b)
            synchronize(device)
            repeats += 1
        best = max(best, repeats * 2 * n**3 / elapsed)
    return best


def _seconds_of_product(n: int, dtype: torch.dtype) -> float:
    a = torch.randn(n, n).to(dtype)
    times = []
    for _ in range(4):  # the first one warms up
        start = time.perf_counter()
        torch.mm(a, a)
        times.append(time.perf_counter() - start)
    return min(times)


def summing_dtype(device: torch.device) -> torch.dtype:
    """Return the dtype for long sums: fp64, but fp32 on MPS, which does not support fp64."""
    return torch.float32 if device.type == "mps" else torch.float64


def device_name(device: torch.device) -> str:
    """Return the product name of a GPU. For other devices, return the device type and the machine's architecture."""
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
    """Copy a tensor from host memory to the device.

    If the device is a GPU, the tensor is first copied to pinned memory. A direct copy would wait until the GPU has
    finished its queued work.
    """
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


class LateValue:
    """A number that is being copied from the device to the host."""

    def __init__(self, value: Tensor | float) -> None:
        self._value = value
        self._copied: torch.cuda.Event | None = None
        if isinstance(value, Tensor) and value.is_cuda:
            self._value = torch.empty((), dtype=value.dtype, pin_memory=True).copy_(value, non_blocking=True)
            self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._copied.record()

    def read(self) -> float:
        """Return the number.

        This call waits until the number is copied to the host. It does not wait for work that was queued on the device
        after this copy.
        """
        if self._copied is not None:
            self._copied.synchronize()
        return float(self._value)


class PeakMemory:
    """The peak memory of this process.

    On a GPU, the peak is the largest memory in use since this object was created. Memory that is allocated inside a
    block of ``ignored`` does not count. On a CPU, it is the largest memory in use since the process was started,
    because the kernel stores only this value.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._earlier_bytes = 0  # the peak before the last block in ``ignored``
        self._forget()

    def read(self) -> int:
        """Return the peak memory in bytes."""
        return max(self._earlier_bytes, peak_memory_bytes(self._device))

    @contextmanager
    def ignored(self) -> Iterator[None]:
        """Return a context manager. Memory that is allocated inside its ``with`` block does not count in the peak.

        This has an effect only on a GPU.
        """
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
    """Return whether ``torch.compile`` can compile and run a trivial function. Log the reason if it cannot."""
    try:
        torch.compile(lambda x: x * 2 + 1)(torch.ones(8, device=device))
    except Exception as error:  # noqa: BLE001 - the toolchain may raise anything
        reason = " ".join(str(error).split())[:160]
        log.warning("torch.compile does not work here, running without it: %s", reason)
        return False
    return True
