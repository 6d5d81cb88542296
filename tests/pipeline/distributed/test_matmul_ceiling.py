"""The ceiling agrees with direct measurements of matrix products."""

from __future__ import annotations

import time

import pytest
import torch

from pipeline.distributed import matmul_ceiling
from pipeline.distributed.matmul_ceiling import measure_matmul_ceiling

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
    small = (matmul_ceiling._SMALL_SQUARE,) * 3
    assert measured == {small, (100, 384, 384)}
    measured.clear()
    assert measure_matmul_ceiling(CPU, torch.float16) == 1e9
    assert measured == {small}


@pytest.mark.gpu
def test_the_ceiling_of_a_gpu_is_higher_in_bf16(gpu: torch.device) -> None:
    fp32, bf16 = (measure_matmul_ceiling(gpu, dtype, seconds=0.1) for dtype in (torch.float32, torch.bfloat16))
    assert bf16 > fp32 > 0
