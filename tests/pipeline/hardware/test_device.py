"""Properties of the device agree with direct measurements."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from pipeline.distributed import environment
from pipeline.distributed.environment import set_allocator_default
from pipeline.hardware.device import (
    LateValue,
    PeakMemory,
    compiler_works,
    copy_to,
    describe_fp32_products,
    matmul_dtype,
    peak_memory_bytes,
    synchronize,
)
from tests.support.runs import run_ranks

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [("fp32", torch.float32), ("amp_bf16", torch.bfloat16), ("amp_fp16", torch.float16), ("bf16", torch.bfloat16)],
)
def test_dtype_of_matrix_products(precision: str, dtype: torch.dtype) -> None:
    assert matmul_dtype(precision) is dtype


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


def test_peak_memory_of_a_gpu_ignores_measurements(monkeypatch: pytest.MonkeyPatch) -> None:
    """``allocated`` stands for torch's record of the peak, which can only be set back to the memory that is in use."""
    allocated = {"peak": 900, "in use": 100}
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda _: allocated["peak"])
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda _: allocated.update(peak=allocated["in use"]))
    memory = PeakMemory(torch.device("cuda", 0))
    assert memory.read() == 100  # 900 was before training
    allocated["peak"] = 300
    with memory.ignored():
        allocated["peak"] = 800
    assert memory.read() == 300
    allocated["peak"] = 400
    assert memory.read() == 400


def test_the_log_says_how_fp32_is_multiplied_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "highest")
    assert "without TF32" in describe_fp32_products("fp32", gpu)
    assert describe_fp32_products("amp_bf16", gpu) == describe_fp32_products("fp32", CPU) == ""
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    assert "with TF32" in describe_fp32_products("fp32", gpu)


#: torch reads the options at its first use of the allocator, so each case needs a process that has not used it.
SETTINGS_PROGRAM = """
import torch
from pipeline.distributed.environment import set_allocator_default
set_allocator_default()
print(torch._C._accelerator_getAllocatorSettings())
"""


@pytest.mark.skipif(not hasattr(torch._C, "_accelerator_getAllocatorSettings"), reason="torch 2.13 and later")
@pytest.mark.parametrize(
    ("variables", "settings"),
    [
        ({}, "expandable_segments:True"),
        ({"PYTORCH_ALLOC_CONF": "max_split_size_mb:64"}, "max_split_size_mb:64"),
        ({"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:32"}, "max_split_size_mb:32"),
    ],
)
def test_gpu_memory_expands_unless_the_user_has_set_an_option(
    variables: dict[str, str], settings: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    program = tmp_path / "settings.py"
    program.write_text(SETTINGS_PROGRAM)
    result = run_ranks(1, program, [])
    assert result.stdout.strip() == settings, result.stderr


def test_gpu_memory_does_not_expand_under_wsl(monkeypatch: pytest.MonkeyPatch) -> None:
    wsl = SimpleNamespace(environ={}, uname=lambda: SimpleNamespace(release="5.15.167.4-microsoft-standard-WSL2"))
    monkeypatch.setattr(environment, "os", wsl)
    set_allocator_default()
    assert not wsl.environ


@pytest.mark.gpu
def test_gpu_memory_expands() -> None:
    program = """
import torch
from pipeline.distributed.environment import set_allocator_default
assert torch.cuda.is_available()  # as in a run, this comes first
set_allocator_default()
memory = torch.ones(1, device="cuda")
assert all(segment["is_expandable"] for segment in torch.cuda.memory_snapshot())
"""
    own = {name: value for name, value in os.environ.items() if "ALLOC_CONF" not in name}
    subprocess.run([sys.executable, "-c", program], check=True, env=own)


@pytest.mark.gpu
def test_a_late_value_of_a_gpu_waits_for_its_own_copy_only(gpu: torch.device) -> None:
    late = LateValue(torch.full((), 7.5, device=gpu))
    torch.cuda._sleep(2 * 10**9)  # about a second
    assert late.read() == 7.5
    assert not torch.cuda.current_stream(gpu).query(), "reading waited for later work"
    synchronize(gpu)
    assert torch.cuda.current_stream(gpu).query()


@pytest.mark.gpu
def test_peak_memory_of_a_gpu_is_the_allocated_memory(gpu: torch.device) -> None:
    torch.cuda.init()
    torch.cuda.reset_peak_memory_stats(gpu)
    before = peak_memory_bytes(gpu)
    tensor = torch.empty(1 << 26, dtype=torch.uint8, device=gpu)
    del tensor
    assert peak_memory_bytes(gpu) == before + (1 << 26)


@pytest.mark.gpu
def test_torch_compile_works_on_a_gpu(gpu: torch.device, caplog: pytest.LogCaptureFixture) -> None:
    assert compiler_works(gpu), caplog.text
