"""The ceiling agrees with direct measurements of matrix products."""

from __future__ import annotations

import time

import pytest
import torch

from pipeline.hardware import matmul_ceiling
from pipeline.hardware.matmul_ceiling import describe_slow_precision, measure_matmul_ceiling

CPU = torch.device("cpu")


def test_the_ceiling_is_the_speed_of_a_large_product(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(matmul_ceiling._CEILING_SQUARES, "cpu", (512,))
    ceiling = measure_matmul_ceiling(CPU, torch.float32)
    a = torch.randn(512, 512)
    durations_s = []
    for _ in range(20):
        start = time.perf_counter()
        torch.mm(a, a)
        durations_s.append(time.perf_counter() - start)
    fastest, slowest = 2 * 512**3 / min(durations_s), 2 * 512**3 / max(durations_s)
    assert slowest / 10 < ceiling < fastest * 10


def test_the_ceiling_is_the_speed_of_the_fastest_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(matmul_ceiling._CEILING_SQUARES, "cpu", (2,))
    slow = measure_matmul_ceiling(CPU, torch.float32, seconds=0.01)
    assert measure_matmul_ceiling(CPU, torch.float32, [(2, 3, 4), (256, 300, 200)], seconds=0.01) > 10 * slow


def test_a_slow_cpu_measures_only_a_small_product(monkeypatch: pytest.MonkeyPatch) -> None:
    measured = set()

    class SlowProduct:
        def __init__(self, shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device) -> None:
            self.shape = shape

        def measure(self, seconds: float) -> float:
            measured.add(self.shape)
            return 1e9

    monkeypatch.setattr(matmul_ceiling, "_Product", SlowProduct)
    assert measure_matmul_ceiling(CPU, torch.float16, [(2048, 384, 1536), (100, 384, 384)]) == 1e9
    small = matmul_ceiling._SMALL
    assert measured == {small, (100, 384, 384)}
    measured.clear()
    assert measure_matmul_ceiling(CPU, torch.float16) == 1e9
    assert measured == {small}


@pytest.mark.parametrize(
    ("precision", "device", "flops", "warns"),
    [
        ("amp_bf16", "cpu", {torch.float32: 9e10, torch.bfloat16: 3e9}, True),
        ("bf16", "cpu", {torch.float32: 9e10, torch.bfloat16: 3e9}, True),
        ("amp_fp16", "cpu", {torch.float32: 9e10, torch.float16: 3e9}, True),
        ("amp_bf16", "cpu", {torch.float32: 9e10, torch.bfloat16: 7e10}, False),
        ("fp32", "cpu", {}, False),
        ("amp_bf16", "cuda", {}, False),
    ],
)
def test_a_precision_that_is_slower_than_fp32_on_a_cpu_gives_a_warning(
    precision: str, device: str, flops: dict[torch.dtype, float], warns: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A CPU without matrix units for 16-bit numbers multiplies them many times slower."""

    class Product:
        def __init__(self, _shape: object, dtype: torch.dtype, _device: object) -> None:
            self.flops = flops[dtype]

        def measure(self, _seconds: float) -> float:
            return self.flops

    monkeypatch.setattr(matmul_ceiling, "_Product", Product)
    expected = (
        f"run.precision={precision} is slow on this CPU: matrix products in fp32 are 30 times as fast; set "
        "run.precision=fp32"
    )
    assert describe_slow_precision(precision, torch.device(device)) == (expected if warns else None)


def test_the_products_of_both_precisions_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Training is slower after a change of the number of threads, even if the old number is set again."""
    monkeypatch.setattr(torch, "set_num_threads", None)
    assert matmul_ceiling._fp32_speedup(torch.bfloat16) > 0


@pytest.mark.gpu
def test_the_ceiling_of_a_gpu_is_higher_in_bf16(gpu: torch.device) -> None:
    fp32, bf16 = (measure_matmul_ceiling(gpu, dtype, seconds=0.1) for dtype in (torch.float32, torch.bfloat16))
    assert bf16 > fp32 > 0
