"""Each precision computes in its dtypes, and gradients arrive in fp32 on fp32 parameters."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn as nn

from pipeline.model.gpt2 import GPT2
from pipeline.model.precision import AutocastModel, Bf16ViewModel, ComputeModel, replicated_compute
from tests.pipeline.conftest import random_tokens, randomised_model, tiny_model_config

CPU = torch.device("cpu")
TOKENS = random_tokens(2, 10)
BATCH = TOKENS[:, :-1], TOKENS[:, 1:]
PRODUCT_DTYPES = {
    "fp32": torch.float32,
    "amp_bf16": torch.bfloat16,
    "amp_fp16": torch.float16,
    "bf16": torch.bfloat16,
}


@pytest.fixture
def model() -> GPT2:
    return randomised_model(tiny_model_config())


def product_dtypes(model: GPT2, compute: ComputeModel) -> set[torch.dtype]:
    """Return the dtypes of the results of all matrix products with weights."""
    seen: set[torch.dtype] = set()

    def record(_module: nn.Module, _inputs: Any, output: torch.Tensor) -> None:
        seen.add(output.dtype)

    hooks = [module.register_forward_hook(record) for module in model.modules() if isinstance(module, nn.Linear)]
    matrices = [parameter for parameter in model.parameters() if parameter.dim() == 2]
    assert len(hooks) == len(matrices) - 1, "only the position embedding has no product"
    compute(BATCH[0], method="logits")
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize(("precision", "dtype"), PRODUCT_DTYPES.items())
class TestEveryPrecision:
    def test_dtype_of_products(self, model: GPT2, precision: str, dtype: torch.dtype) -> None:
        assert product_dtypes(model, replicated_compute(model, precision, CPU)) == {dtype}

    def test_no_wrapper_can_switch_it_off(self, model: GPT2, precision: str, dtype: torch.dtype) -> None:
        with torch.autocast("cpu", enabled=False):
            assert product_dtypes(model, replicated_compute(model, precision, CPU)) == {dtype}

    def test_the_loss_is_fp32(self, model: GPT2, precision: str, dtype: torch.dtype) -> None:
        compute = replicated_compute(model, precision, CPU)
        assert compute(*BATCH).dtype == torch.float32
        assert compute(BATCH[0], method="logits").dtype == dtype

    def test_gradients_are_fp32_on_fp32_parameters(self, model: GPT2, precision: str, dtype: torch.dtype) -> None:
        replicated_compute(model, precision, CPU)(*BATCH).backward()
        for name, parameter in model.named_parameters():
            assert parameter.dtype == torch.float32, name
            assert parameter.grad is not None and parameter.grad.dtype == torch.float32, name
        model.assert_tied()

    def test_the_loss_is_near_that_of_fp32(self, model: GPT2, precision: str, dtype: torch.dtype) -> None:
        expected = model(*BATCH).item()
        tolerance = 1e-7 if precision == "fp32" else 0.02
        assert replicated_compute(model, precision, CPU)(*BATCH).item() == pytest.approx(expected, rel=tolerance)

    def test_parameters_keep_their_names(self, model: GPT2, precision: str, dtype: torch.dtype) -> None:
        names = [name for name, _ in replicated_compute(model, precision, CPU).named_parameters()]
        assert names == [f"model.{name}" for name, _ in model.named_parameters()]


class TestBf16View:
    def truly_bf16(self, model: GPT2) -> GPT2:
        lowered = copy.deepcopy(model).to(torch.bfloat16)
        lowered.assert_tied()
        return lowered

    def test_gradients_are_those_of_a_bf16_model(self, model: GPT2) -> None:
        """They include the tied weight, whose gradient comes from the embedding and from the output layer."""
        lowered = self.truly_bf16(model)
        assert Bf16ViewModel(model)(*BATCH).item() == lowered(*BATCH).item()
        Bf16ViewModel(model)(*BATCH).backward()
        lowered(*BATCH).backward()
        for name, parameter in model.named_parameters():
            gradient = lowered.get_parameter(name).grad
            assert gradient is not None and gradient.dtype == torch.bfloat16
            assert torch.equal(parameter.grad, gradient.float()), name

    def test_micro_batches_accumulate_in_fp32(self, model: GPT2) -> None:
        view = Bf16ViewModel(model)
        alone = []
        for seed in range(4):
            tokens = random_tokens(2, 10, seed=seed)
            model.zero_grad()
            view(tokens[:, :-1], tokens[:, 1:]).backward()
            alone.append({name: p.grad.clone() for name, p in model.named_parameters()})
        model.zero_grad()
        for seed in range(4):
            tokens = random_tokens(2, 10, seed=seed)
            view(tokens[:, :-1], tokens[:, 1:]).backward()
        for name, parameter in model.named_parameters():
            expected = sum(gradients[name] for gradients in alone)
            torch.testing.assert_close(parameter.grad, expected, rtol=1e-6, atol=1e-6)
        rounded = model.wte.weight.grad.to(torch.bfloat16).float()
        assert not torch.equal(rounded, model.wte.weight.grad), "the sum has more digits than bf16"


def test_autocast_does_not_leak(model: GPT2) -> None:
    AutocastModel(model, "amp_bf16", CPU)(*BATCH)
    assert not torch.is_autocast_enabled("cpu")
