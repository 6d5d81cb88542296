"""The loss scale of fp16: down after an overflow, up after a long good time."""

from __future__ import annotations

import pytest

from pipeline.loss_scaling import GROWTH_INTERVAL, LossScaler


def test_fp16_starts_high() -> None:
    assert LossScaler.for_precision("amp_fp16").scale == 65536.0


@pytest.mark.parametrize("precision", ["fp32", "amp_bf16", "bf16"])
def test_other_precisions_are_never_scaled(precision: str) -> None:
    scaler = LossScaler.for_precision(precision)
    for overflowed in [False] * (GROWTH_INTERVAL + 1) + [True]:
        scaler.update(overflowed=overflowed)
    assert scaler.scale == 1.0


def test_an_overflow_halves() -> None:
    scaler = LossScaler.for_precision("amp_fp16")
    scaler.update(overflowed=True)
    scaler.update(overflowed=True)
    assert scaler.scale == 16384.0


def test_good_steps_in_a_row_double_and_count_anew() -> None:
    scaler = LossScaler.for_precision("amp_fp16")
    for _ in range(GROWTH_INTERVAL - 1):
        scaler.update(overflowed=False)
    assert scaler.scale == 65536.0
    scaler.update(overflowed=False)
    assert scaler.scale == 131072.0
    for _ in range(GROWTH_INTERVAL - 1):
        scaler.update(overflowed=False)
    assert scaler.scale == 131072.0


def test_an_overflow_ends_the_row() -> None:
    scaler = LossScaler.for_precision("amp_fp16")
    for overflowed in [False] * 10 + [True] + [False] * (GROWTH_INTERVAL - 1):
        scaler.update(overflowed=overflowed)
    assert scaler.scale == 32768.0
    scaler.update(overflowed=False)
    assert scaler.scale == 65536.0
