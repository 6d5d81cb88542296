"""Properties of the device agree with direct measurements."""

from __future__ import annotations

import re
import sys
import time
from pathlib import Path

import pytest
import torch

from pipeline.distributed import device
from pipeline.distributed.device import (
    compiler_works,
    copy_to,
    matmul_dtype,
    measure_matmul_ceiling,
    peak_memory_bytes,
)

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [("fp32", torch.float32), ("amp_bf16", torch.bfloat16), ("amp_fp16", torch.float16), ("bf16", torch.bfloat16)],
)
def test_dtype_of_matrix_products(precision: str, dtype: torch.dtype) -> None:
    assert matmul_dtype(precision) is dtype


def test_the_ceiling_is_the_speed_of_a_large_product(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(device._CEILING_SIZE, "cpu", 512)
    ceiling = measure_matmul_ceiling(CPU, torch.float32)
    a = torch.randn(512, 512)
    durations_s = []
    for _ in range(20):
        start = time.perf_counter()
        torch.mm(a, a)
        durations_s.append(time.perf_counter() - start)
    fastest, slowest = 2 * 512**3 / min(durations_s), 2 * 512**3 / max(durations_s)
    assert slowest / 10 < ceiling < fastest * 10


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_peak_memory_is_in_bytes() -> None:
    status = Path("/proc/self/status").read_text()
    (peak_kib,) = re.findall(r"VmHWM:\s+(\d+) kB", status)
    assert peak_memory_bytes(CPU) == pytest.approx(int(peak_kib) * 1024, rel=0.05)


def test_a_broken_compiler_is_logged(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def broken(function: object) -> object:
        raise RuntimeError("no C++ compiler\nfound")

    monkeypatch.setattr(torch, "compile", broken)
    assert not compiler_works(CPU)
    assert "no C++ compiler found" in caplog.text


def test_a_working_compiler_is_used(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(torch, "compile", lambda function: function)
    assert compiler_works(CPU)
    assert caplog.text == ""


class HostTensor:
    """Stands for a tensor in host memory and records how it is copied."""

    def __init__(self) -> None:
        self.calls: list[object] = []

    def pin_memory(self) -> HostTensor:
        self.calls.append("pin_memory")
        return self

    def to(self, device: torch.device, non_blocking: bool = False) -> HostTensor:
        self.calls.append((device.type, non_blocking))
        return self


@pytest.mark.parametrize(("type_", "calls"), [("cuda", ["pin_memory", ("cuda", True)]), ("cpu", [("cpu", False)])])
def test_copies_to_a_gpu_start_in_pinned_memory(type_: str, calls: list[object]) -> None:
    tensor = HostTensor()
    copy_to(tensor, torch.device(type_))  # type: ignore[arg-type]
    assert tensor.calls == calls
