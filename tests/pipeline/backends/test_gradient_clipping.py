"""Backends share one gradient norm, clip after unscaling the loss, and skip gradients that are not finite."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from pipeline.backends.gradient_clipping import clip_and_step, global_grad_norm, step_if_finite, unscale_and_clip
from pipeline.backends.optimizer import build_adamw
from pipeline.config.schema import OptimizerConfig
from pipeline.model.gpt2 import build_model
from tests.pipeline.conftest import random_tokens, tiny_model_config

CPU = torch.device("cpu")


def some_gradients(seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in ((7, 3), (5,), (2, 2, 2), (1,))]


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
