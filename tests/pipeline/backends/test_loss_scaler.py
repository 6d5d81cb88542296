"""The loss scale of fp16 is halved after an overflow, and doubled after many good steps."""

from __future__ import annotations

import math

import pytest
import torch

from pipeline.backends.gradient_clipping import clip_and_step
from pipeline.backends.loss_scaler import GROWTH_INTERVAL, LossScaler
from pipeline.backends.optimizer import build_adamw
from pipeline.config.schema import OptimizerConfig

GOOD, OVERFLOW = 1.5, math.inf


def test_fp16_starts_high() -> None:
    assert LossScaler.for_precision("amp_fp16").scale == 65536.0


def test_the_gradients_of_a_micro_batch_are_the_same_at_every_world_size() -> None:
    """The trainer multiplies the loss by the world size. Only a dynamic scale undoes this before the reduction."""
    for world_size in (1, 2, 4):
        assert world_size * LossScaler.for_precision("amp_fp16", world_size).factor == 65536.0
        assert LossScaler.for_precision("bf16", world_size).factor == 1.0


@pytest.mark.parametrize("precision", ["fp32", "amp_bf16", "bf16"])
def test_other_precisions_are_never_scaled(precision: str) -> None:
    scaler = LossScaler.for_precision(precision)
    for norm in [GOOD] * (GROWTH_INTERVAL + 1) + [OVERFLOW]:
        scaler.update(norm)
    assert scaler.scale == 1.0


@pytest.mark.parametrize("norm", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("on_device", [False, True], ids=["number", "tensor"])
def test_an_overflow_halves(norm: float, on_device: bool) -> None:
    scaler = LossScaler.for_precision("amp_fp16")
    for _ in range(2):
        scaler.update(torch.tensor(norm, dtype=torch.float64) if on_device else norm)
    assert scaler.scale == 16384.0


def test_good_steps_in_a_row_double_the_scale() -> None:
    scaler = LossScaler.for_precision("amp_fp16")
    for _ in range(GROWTH_INTERVAL - 1):
        scaler.update(GOOD)
    assert scaler.scale == 65536.0
    scaler.update(GOOD)
    assert scaler.scale == 131072.0
    for _ in range(GROWTH_INTERVAL - 1):
        scaler.update(GOOD)
    assert scaler.scale == 131072.0


def test_an_overflow_resets_the_count_of_good_steps() -> None:
    scaler = LossScaler.for_precision("amp_fp16")
    for norm in [GOOD] * 10 + [OVERFLOW] + [GOOD] * (GROWTH_INTERVAL - 1):
        scaler.update(norm)
    assert scaler.scale == 32768.0
    scaler.update(GOOD)
    assert scaler.scale == 65536.0


def test_a_dynamic_scale_continues_from_a_checkpoint() -> None:
    scaler = LossScaler.for_precision("amp_fp16")
    scaler.restore(1024.0, GROWTH_INTERVAL - 1)
    scaler.update(GOOD)
    assert (scaler.scale, scaler.good_steps) == (2048.0, 0)


def test_a_precision_without_a_scale_ignores_that_of_a_checkpoint() -> None:
    scaler = LossScaler.for_precision("amp_bf16")
    scaler.restore(1024.0, 5)
    assert (scaler.scale, scaler.good_steps) == (1.0, 0)


@pytest.mark.gpu
def test_an_overflow_on_a_gpu_halves_the_loss_scale(gpu: torch.device) -> None:
    weight = torch.nn.Parameter(torch.ones(3, device=gpu))
    adamw, scaler = build_adamw([weight], OptimizerConfig(), gpu), LossScaler.for_precision("amp_fp16")
    for gradient, scale in ((OVERFLOW, 2.0**15), (GOOD * 2.0**15, 2.0**15)):
        before = weight.detach().clone()
        weight.grad = torch.full((3,), gradient, device=gpu)
        scaler.update(clip_and_step(adamw, [weight], scaler.scale, 1.0))
        assert scaler.scale == scale
        assert torch.equal(weight, before) == (gradient == OVERFLOW)
