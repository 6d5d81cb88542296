"""Decay where it belongs, one gradient norm, clipping after unscaling."""

from __future__ import annotations

import logging
import math

import pytest
import torch
from torch import Tensor

from pipeline import optimizer as optimizer_module
from pipeline.config import OptimizerConfig
from pipeline.loss_scaling import LossScaler
from pipeline.model import build_model
from pipeline.optimizer import (
    build_adamw,
    clip_unless_overflowed,
    global_grad_norm,
    parameter_groups,
    set_learning_rate,
    unscale_and_clip,
)
from tests.pipeline.conftest import random_tokens, tiny_model_config

CPU = torch.device("cpu")


def some_gradients(seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in ((7, 3), (5,), (2, 2, 2), (1,))]


class TestGroups:
    def test_only_matrices_decay(self) -> None:
        model = build_model(tiny_model_config(), 1)
        adamw = build_adamw(model.parameters(), OptimizerConfig(weight_decay=0.25), CPU)
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        decay = {names[id(p)]: group["weight_decay"] for group in adamw.param_groups for p in group["params"]}
        assert len(decay) == len(names)
        for name, weight_decay in decay.items():
            spared = name.endswith("bias") or "ln_" in name
            assert weight_decay == (0.0 if spared else 0.25), name

    def test_the_tied_weight_is_there_once(self) -> None:
        model = build_model(tiny_model_config(), 1)
        groups = parameter_groups(model.parameters(), 0.1)
        assert sum(p is model.wte.weight for group in groups for p in group["params"]) == 1

    def test_decay_shrinks_matrices_and_nothing_else(self) -> None:
        """With gradients of zero AdamW only decays: p <- p (1 - lr decay)."""
        matrix, bias = torch.nn.Parameter(torch.ones(2, 2)), torch.nn.Parameter(torch.ones(2))
        adamw = build_adamw([matrix, bias], OptimizerConfig(learning_rate=0.1, weight_decay=0.5), CPU)
        matrix.grad, bias.grad = torch.zeros(2, 2), torch.zeros(2)
        adamw.step()
        torch.testing.assert_close(matrix.detach(), torch.full((2, 2), 0.95))
        assert (bias == 1.0).all()

    def test_settings_reach_adamw(self) -> None:
        config = OptimizerConfig(learning_rate=3e-4, betas=(0.8, 0.9), eps=1e-6)
        defaults = build_adamw([torch.nn.Parameter(torch.ones(2))], config, CPU).defaults
        assert (defaults["lr"], defaults["betas"], defaults["eps"]) == (3e-4, (0.8, 0.9), 1e-6)
        assert defaults["fused"]

    def test_a_device_without_fused_adamw_says_so(
        self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        monkeypatch.setattr(optimizer_module, "FUSED_DEVICES", ())
        with caplog.at_level(logging.WARNING):
            adamw = build_adamw([torch.nn.Parameter(torch.ones(2))], OptimizerConfig(), CPU)
        assert not adamw.defaults["fused"]
        assert "not available on cpu" in caplog.text

    def test_the_learning_rate_is_set_everywhere(self) -> None:
        adamw = build_adamw(build_model(tiny_model_config(), 1).parameters(), OptimizerConfig(), CPU)
        set_learning_rate(adamw.param_groups, 0.125)
        assert [group["lr"] for group in adamw.param_groups] == [0.125, 0.125]


class TestNorm:
    def test_by_hand(self) -> None:
        norm = global_grad_norm([torch.tensor([[3.0, 0.0]]), torch.tensor([4.0, 12.0])])
        assert norm.item() == pytest.approx(13.0, rel=1e-14)

    def test_the_order_of_gradients_does_not_show(self) -> None:
        gradients = [gradient * 10.0 ** (3 * i) for i, gradient in enumerate(some_gradients() * 20)][:12]
        norms = {
            float(global_grad_norm(order)) for order in (gradients, gradients[::-1], gradients[5:] + gradients[:5])
        }
        assert max(norms) / min(norms) - 1 < 1e-15

    def test_a_long_sum_is_exact(self) -> None:
        """In fp32, squares of this size would no longer add to the sum."""
        gradients = [torch.full((1,), 4096.0), *[torch.ones(1)] * 2000]
        assert global_grad_norm(gradients).item() == math.sqrt(4096.0**2 + 2000)

    def test_the_cut_of_a_gradient_does_not_show(self) -> None:
        (gradient, *_) = some_gradients()
        whole = global_grad_norm([gradient]).item()
        assert global_grad_norm(list(gradient.flatten().split(4))).item() == pytest.approx(whole, rel=1e-14)

    def test_the_tied_weight_counts_once(self) -> None:
        model = build_model(tiny_model_config(), 1)
        tokens = random_tokens(2, 9)
        model(tokens[:, :-1], tokens[:, 1:]).backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        squares = sum(gradient.double().square().sum().item() for gradient in gradients.values())
        assert set(gradients) == {name for name, _ in model.named_parameters()} and "lm_head.weight" not in gradients
        assert global_grad_norm([p.grad for p in model.parameters()]).item() == pytest.approx(math.sqrt(squares))

    @pytest.mark.parametrize("value", [math.inf, math.nan])
    def test_what_is_not_finite_shows(self, value: float) -> None:
        assert not math.isfinite(global_grad_norm([torch.ones(3), torch.tensor([1.0, value])]))


class TestClipping:
    @pytest.mark.parametrize("max_norm", [0.01, 1.0, 5.0, 1e4])
    def test_as_torch_clips(self, max_norm: float) -> None:
        ours, theirs = some_gradients(), [torch.nn.Parameter(torch.zeros_like(g)) for g in some_gradients()]
        for parameter, gradient in zip(theirs, some_gradients(), strict=True):
            parameter.grad = gradient
        torch.nn.utils.clip_grad_norm_(theirs, max_norm)
        unscale_and_clip(ours, global_grad_norm(ours), 1.0, max_norm)
        for gradient, parameter in zip(ours, theirs, strict=True):
            torch.testing.assert_close(gradient, parameter.grad, rtol=1e-6, atol=1e-6 * max_norm)

    def test_the_norm_afterwards_is_the_limit(self) -> None:
        gradients = some_gradients()
        unscale_and_clip(gradients, global_grad_norm(gradients), 1.0, 0.5)
        assert global_grad_norm(gradients).item() == pytest.approx(0.5, rel=1e-5)

    def test_small_gradients_are_left_alone(self) -> None:
        gradients = some_gradients()
        unscale_and_clip(gradients, global_grad_norm(gradients), 1.0, 1e6)
        assert all(torch.equal(a, b) for a, b in zip(gradients, some_gradients(), strict=True))

    def test_zero_means_no_clipping(self) -> None:
        gradients = [gradient * 1e6 for gradient in some_gradients()]
        unscale_and_clip(gradients, global_grad_norm(gradients), 1.0, 0.0)
        assert all(torch.equal(a, b * 1e6) for a, b in zip(gradients, some_gradients(), strict=True))

    @pytest.mark.parametrize("max_norm", [0.0, 0.5, 1e6])
    def test_scaled_gradients_end_as_if_never_scaled(self, max_norm: float) -> None:
        """Unscaling comes before clipping: the limit is for the true norm."""
        scale = 2.0**16
        plain, scaled = some_gradients(), [gradient * scale for gradient in some_gradients()]
        norm = global_grad_norm(plain)
        unscale_and_clip(plain, norm, 1.0, max_norm)
        unscale_and_clip(scaled, global_grad_norm(scaled) / scale, scale, max_norm)
        for a, b in zip(plain, scaled, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=0)

    def test_the_norm_is_that_before_scaling_and_clipping(self) -> None:
        expected = global_grad_norm(some_gradients()).item()
        scaled = [gradient * 1024 for gradient in some_gradients()]
        norm, overflowed = clip_unless_overflowed(scaled, LossScaler(dynamic=True, scale=1024.0), 0.5)
        assert norm.item() == pytest.approx(expected, rel=1e-12)
        assert not overflowed
        assert global_grad_norm(scaled).item() == pytest.approx(0.5, rel=1e-5)

    def test_gradients_that_overflowed_are_to_be_skipped(self) -> None:
        gradients = [torch.ones(3), torch.tensor([1.0, math.inf])]
        _, overflowed = clip_unless_overflowed(gradients, LossScaler.for_precision("amp_fp16"), 1.0)
        assert overflowed
        assert (gradients[0] == 1.0).all()

    def test_without_a_loss_scale_no_step_is_skipped(self) -> None:
        """What is not finite then is a defect of the run, which the trainer stops."""
        norm, overflowed = clip_unless_overflowed([torch.tensor([math.nan])], LossScaler.for_precision("fp32"), 1.0)
        assert not overflowed
        assert math.isnan(norm)
