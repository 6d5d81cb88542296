"""Describe a device, and copy values between the device and the host."""

import logging
import platform
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from data_tools.errors import one_line

log = logging.getLogger(__name__)

GIB = 1 << 30


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
        reason = one_line(error)[:160]
        log.warning("torch.compile does not work here, running without it: %s", reason)
        return False
    return True
