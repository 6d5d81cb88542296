"""AdamW decays matrices only, backends share one gradient norm, and clipping comes after unscaling the loss."""

from __future__ import annotations

import functools
import logging
import math
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from pipeline.backends import optimizer as optimizer_module
from pipeline.backends.eager_optimizers import without_compiler_wrappers
from pipeline.backends.optimizer import (
    GROWTH_INTERVAL,
    LossScaler,
    build_adamw,
    clip_and_step,
    global_grad_norm,
    parameter_groups,
    set_learning_rate,
    step_if_finite,
    unscale_and_clip,
)
from pipeline.config.schema import OptimizerConfig
from pipeline.model.gpt2 import build_model
from tests.pipeline.conftest import random_tokens, tiny_model_config
from tests.support.runs import REPOSITORY

CPU = torch.device("cpu")
GOOD, OVERFLOW = 1.5, math.inf


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

    def test_a_device_without_fused_adamw_is_logged(
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

    def test_the_order_of_gradients_does_not_matter(self) -> None:
        gradients = [gradient * 10.0 ** (3 * i) for i, gradient in enumerate(some_gradients() * 20)][:12]
        norms = {
            float(global_grad_norm(order)) for order in (gradients, gradients[::-1], gradients[5:] + gradients[:5])
        }
        assert max(norms) / min(norms) - 1 < 1e-15

    def test_a_long_sum_is_exact(self) -> None:
        """In fp32, adding 1 to this sum would not change it."""
        gradients = [torch.full((1,), 4096.0), *[torch.ones(1)] * 2000]
        assert global_grad_norm(gradients).item() == math.sqrt(4096.0**2 + 2000)

    def test_splitting_a_gradient_does_not_matter(self) -> None:
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
    def test_it_is_not_finite_if_a_gradient_is_not(self, value: float) -> None:
        assert not math.isfinite(global_grad_norm([torch.ones(3), torch.tensor([1.0, value])]))


class TestClipping:
    @pytest.mark.parametrize("max_norm", [0.01, 1.0, 5.0, 1e4])
    def test_as_torch_clips(self, max_norm: float) -> None:
        ours, theirs = some_gradients(), [torch.nn.Parameter(torch.zeros_like(g)) for g in some_gradients()]
        for parameter, gradient in zip(theirs, some_gradients(), strict=True):
            parameter.grad = gradient
        torch.nn.utils.clip_grad_norm_(theirs, max_norm)
        unscale_and_clip(ours, 1.0, max_norm)
        for gradient, parameter in zip(ours, theirs, strict=True):
            torch.testing.assert_close(gradient, parameter.grad, rtol=1e-6, atol=1e-6 * max_norm)

    def test_the_norm_afterwards_is_the_limit(self) -> None:
        gradients = some_gradients()
        unscale_and_clip(gradients, 1.0, 0.5)
        assert global_grad_norm(gradients).item() == pytest.approx(0.5, rel=1e-5)

    def test_small_gradients_are_left_alone(self) -> None:
        gradients = some_gradients()
        unscale_and_clip(gradients, 1.0, 1e6)
        assert all(torch.equal(a, b) for a, b in zip(gradients, some_gradients(), strict=True))

    def test_zero_means_no_clipping(self) -> None:
        gradients = [gradient * 1e6 for gradient in some_gradients()]
        unscale_and_clip(gradients, 1.0, 0.0)
        assert all(torch.equal(a, b * 1e6) for a, b in zip(gradients, some_gradients(), strict=True))

    @pytest.mark.parametrize("max_norm", [0.0, 0.5, 1e6])
    def test_scaled_gradients_end_as_if_never_scaled(self, max_norm: float) -> None:
        """Unscaling comes before clipping, so the limit applies to the true norm."""
        scale = 2.0**16
        plain, scaled = some_gradients(), [gradient * scale for gradient in some_gradients()]
        unscale_and_clip(plain, 1.0, max_norm)
        unscale_and_clip(scaled, scale, max_norm)
        for a, b in zip(plain, scaled, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=0)

    def test_the_norm_is_that_before_scaling_and_clipping(self) -> None:
        expected = global_grad_norm(some_gradients()).item()
        scaled = [gradient * 1024 for gradient in some_gradients()]
        norm = unscale_and_clip(scaled, 1024.0, 0.5)
        assert norm.item() == pytest.approx(expected, rel=1e-12)
        assert global_grad_norm(scaled).item() == pytest.approx(0.5, rel=1e-5)

    @pytest.mark.parametrize("loss_scale", [1.0, 2.0**16])
    @pytest.mark.parametrize("value", [math.inf, math.nan])
    def test_gradients_that_are_not_finite_are_skipped(self, value: float, loss_scale: float) -> None:
        """They are skipped with a loss scale and without."""
        norm = unscale_and_clip([torch.ones(3), torch.tensor([1.0, value])], loss_scale, 1.0)
        assert not math.isfinite(norm)
        assert not self.steps(norm)

    def test_every_finite_norm_is_stepped(self) -> None:
        for value in (0.0, 1e-300, 1.0, 1e300):
            assert self.steps(torch.tensor(value, dtype=torch.float64))

    @staticmethod
    def steps(norm: Tensor) -> bool:
        """Return whether a parameter with a gradient changes."""
        parameter = torch.nn.Parameter(torch.ones(2))
        parameter.grad = torch.ones(2)
        step_if_finite(build_adamw([parameter], OptimizerConfig(), CPU), norm)
        return not torch.equal(parameter, torch.ones(2))


class TestSkipping:
    """A step whose gradients are not finite changes nothing."""

    @staticmethod
    def state(model: torch.nn.Module, adamw: torch.optim.AdamW) -> dict[str, Tensor]:
        state = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        for name, parameter in model.named_parameters():
            state |= {f"{name} {key}": value.clone() for key, value in adamw.state[parameter].items()}
        return state

    @staticmethod
    def step(model: torch.nn.Module, adamw: torch.optim.AdamW, gradients: list[Tensor]) -> None:
        for parameter, gradient in zip(model.parameters(), gradients, strict=True):
            parameter.grad = gradient
        clip_and_step(adamw, model.parameters(), 1.0, 1.0)
        adamw.zero_grad(set_to_none=True)

    @pytest.mark.parametrize("where", ["one element", "everywhere"])
    @pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
    @pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
    def test_nothing_moves(self, device: str, value: float, where: str) -> None:
        """Weights, moments and step count stay, and the next good step is as if the bad ones had not been."""

        def gradients(seed: int) -> list[Tensor]:
            generator = torch.Generator().manual_seed(seed)
            return [torch.randn(shape, generator=generator).to(device) for shape in ((3, 5), (3,))]

        def bad() -> list[Tensor]:
            made = gradients(9)
            for gradient in made if where == "everywhere" else made[-1:]:
                gradient.view(-1)[slice(None) if where == "everywhere" else slice(1)] = value
            return made

        models = [torch.nn.Linear(5, 3).to(device) for _ in range(2)]
        models[1].load_state_dict(models[0].state_dict())
        steady, disturbed = (
            (model, build_adamw(model.parameters(), OptimizerConfig(), torch.device(device))) for model in models
        )
        for seed in range(3):
            before = self.state(*disturbed)
            self.step(*disturbed, bad())
            after = self.state(*disturbed)
            for name, tensor in before.items():
                assert torch.equal(after[name], tensor), name
            for model, adamw in (steady, disturbed):
                self.step(model, adamw, gradients(seed))
            expected = self.state(*steady)
            for name, tensor in self.state(*disturbed).items():
                assert torch.equal(tensor, expected[name]), name
        assert {float(state["step"]) for state in disturbed[1].state.values()} == {3.0}


class TestLossScale:
    """The loss scale of fp16 is halved after an overflow, and doubled after many good steps."""

    def test_fp16_starts_high(self) -> None:
        assert LossScaler.for_precision("amp_fp16").scale == 65536.0

    def test_the_gradients_of_a_micro_batch_are_the_same_at_every_world_size(self) -> None:
        """The trainer multiplies the loss by the world size. Only a dynamic scale undoes this before the reduction."""
        for world_size in (1, 2, 4):
            assert world_size * LossScaler.for_precision("amp_fp16", world_size).factor == 65536.0
            assert LossScaler.for_precision("bf16", world_size).factor == 1.0

    @pytest.mark.parametrize("precision", ["fp32", "amp_bf16", "bf16"])
    def test_other_precisions_are_never_scaled(self, precision: str) -> None:
        scaler = LossScaler.for_precision(precision)
        for norm in [GOOD] * (GROWTH_INTERVAL + 1) + [OVERFLOW]:
            scaler.update(norm)
        assert scaler.scale == 1.0

    @pytest.mark.parametrize("norm", [math.inf, -math.inf, math.nan])
    @pytest.mark.parametrize("on_device", [False, True], ids=["number", "tensor"])
    def test_an_overflow_halves(self, norm: float, on_device: bool) -> None:
        scaler = LossScaler.for_precision("amp_fp16")
        for _ in range(2):
            scaler.update(torch.tensor(norm, dtype=torch.float64) if on_device else norm)
        assert scaler.scale == 16384.0

    def test_good_steps_in_a_row_double_the_scale(self) -> None:
        scaler = LossScaler.for_precision("amp_fp16")
        for _ in range(GROWTH_INTERVAL - 1):
            scaler.update(GOOD)
        assert scaler.scale == 65536.0
        scaler.update(GOOD)
        assert scaler.scale == 131072.0
        for _ in range(GROWTH_INTERVAL - 1):
            scaler.update(GOOD)
        assert scaler.scale == 131072.0

    def test_an_overflow_resets_the_count_of_good_steps(self) -> None:
        scaler = LossScaler.for_precision("amp_fp16")
        for norm in [GOOD] * 10 + [OVERFLOW] + [GOOD] * (GROWTH_INTERVAL - 1):
            scaler.update(norm)
        assert scaler.scale == 32768.0
        scaler.update(GOOD)
        assert scaler.scale == 65536.0

    def test_a_dynamic_scale_continues_from_a_checkpoint(self) -> None:
        scaler = LossScaler.for_precision("amp_fp16")
        scaler.restore(1024.0, GROWTH_INTERVAL - 1)
        scaler.update(GOOD)
        assert (scaler.scale, scaler.good_steps) == (2048.0, 0)

    def test_a_precision_without_a_scale_ignores_that_of_a_checkpoint(self) -> None:
        scaler = LossScaler.for_precision("amp_bf16")
        scaler.restore(1024.0, 5)
        assert (scaler.scale, scaler.good_steps) == (1.0, 0)


@pytest.mark.gpu
def test_fused_adamw_on_a_gpu_updates_as_on_a_cpu(gpu: torch.device) -> None:
    """Clipping, the gradient norm and the update are the same, and the host does not wait for the norm."""
    results = []
    for device in (CPU, gpu):
        weights = [torch.nn.Parameter(gradient.to(device)) for gradient in some_gradients(seed=9)]
        adamw = build_adamw(weights, OptimizerConfig(), device)
        assert adamw.defaults["fused"]
        norms = []
        for seed in range(5):
            for weight, gradient in zip(weights, some_gradients(seed), strict=True):
                weight.grad = gradient.to(device)
            norms.append(clip_and_step(adamw, weights, 4.0, 0.5))
        assert all(norm.device.type == device.type and norm.dtype == torch.float64 for norm in norms)
        results.append(([norm.item() for norm in norms], [weight.detach().cpu() for weight in weights]))
    (norms_on_cpu, on_cpu), (norms_on_gpu, on_gpu) = results
    assert norms_on_gpu == pytest.approx(norms_on_cpu, rel=1e-12)
    for found, expected in zip(on_gpu, on_cpu, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)


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


def test_adamw_is_torchs_and_does_not_import_the_compiler() -> None:
    """The import takes a second. A fresh interpreter, because other tests import the compiler."""
    code = """
import sys, torch
from pipeline.backends.optimizer import build_adamw
from pipeline.config.schema import OptimizerConfig
config = OptimizerConfig(grad_clip=0)
ours, theirs = (torch.nn.Parameter(torch.linspace(-1, 1, 6).view(2, 3)) for _ in range(2))
adamw = build_adamw([ours], config, torch.device("cpu"))
def train(parameter, optimizer):
    for factor in (1.0, 2.0):
        (factor * parameter.square().sum()).backward()
        optimizer.step()
        optimizer.zero_grad()
train(ours, adamw)
assert ours.grad is None and ours.requires_grad
assert "torch._dynamo" not in sys.modules
group = adamw.param_groups[0]
settings = {key: group[key] for key in ("lr", "betas", "eps", "weight_decay", "fused")}
train(theirs, torch.optim.AdamW([theirs], **settings))
assert torch.equal(ours, theirs)
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=REPOSITORY)


def test_a_wrapper_of_a_later_torch_stays() -> None:
    def step(parameter: int) -> int:
        return parameter

    @functools.wraps(step)
    def _later_wrapper(parameter: int) -> int:
        return step(parameter) + 1

    @functools.wraps(_later_wrapper)
    def _use_grad(parameter: int) -> int:
        return _later_wrapper(parameter) + 10

    assert without_compiler_wrappers(_use_grad)(0) == 1
