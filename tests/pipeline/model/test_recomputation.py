"""Recomputed blocks give the same loss and gradients, in every precision and compiled, under the same names."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch._functorch.config as functorch_config
from torch import Tensor, nn

from pipeline.model.gpt2 import GPT2, MLP, build_model
from pipeline.model.precision import Bf16ViewModel
from pipeline.model.recomputation import recompute_blocks
from tests.pipeline.conftest import random_tokens, randomised_model, tiny_model_config

TOKENS = random_tokens(3, 12)
BATCH = TOKENS[:, :-1], TOKENS[:, 1:]


def gradients(model: GPT2, loss: Tensor) -> dict[str, Tensor]:
    loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.fixture
def forwards(monkeypatch: pytest.MonkeyPatch) -> list[MLP]:
    """The MLPs that ran forward, in order."""
    ran: list[MLP] = []
    forward = MLP.forward

    def counted(self: MLP, x: Tensor) -> Tensor:
        ran.append(self)
        return forward(self, x)

    monkeypatch.setattr(MLP, "forward", counted)
    return ran


@pytest.mark.parametrize("recompute", [True, 2])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_same_loss_and_gradients(dropout: float, recompute: bool | int) -> None:
    found = []
    for setting in (False, recompute):
        config = tiny_model_config(n_layer=3, dropout=dropout, activation_checkpointing=setting)
        model = randomised_model(config).train()
        recompute_blocks(model)
        torch.manual_seed(5)
        loss = model.loss(*BATCH)
        found.append((loss.item(), gradients(model, loss)))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-7)
    assert found[0][1].keys() == found[1][1].keys()
    for name, gradient in found[0][1].items():
        torch.testing.assert_close(found[1][1][name], gradient, rtol=1e-5, atol=1e-6)


def test_compiled_dropout_keeps_to_the_seeds_of_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """On CUDA, compiled code can draw masks from generators that the seeds of a run do not reach."""
    monkeypatch.setattr(functorch_config, "graphsafe_rng_functionalization", True)
    recompute_blocks(build_model(tiny_model_config(dropout=0.3, activation_checkpointing=True), seed=0))
    assert not functorch_config.graphsafe_rng_functionalization


@pytest.mark.parametrize(
    ("recompute", "again"),
    [(False, []), (True, [4, 3, 2, 1, 0]), (1, [4, 3, 2, 1, 0]), (2, [4, 2, 0]), (3, [3, 0])],
)
def test_which_blocks_run_again_in_the_backward_pass(
    recompute: bool | int, again: list[int], forwards: list[MLP]
) -> None:
    model = build_model(tiny_model_config(n_layer=5, activation_checkpointing=recompute), 1)
    recompute_blocks(model)
    model.loss(*BATCH).backward()
    blocks = [block.mlp for block in model.h]
    assert [blocks.index(mlp) for mlp in forwards] == [0, 1, 2, 3, 4, *again]


@pytest.mark.parametrize("wrong", [0, -1, 3, "all", 1.5])
def test_what_is_no_number_of_blocks_is_refused(wrong: Any) -> None:
    with pytest.raises(ValueError, match="activation_checkpointing"):
        tiny_model_config(activation_checkpointing=wrong)


@pytest.mark.parametrize("recompute", [True, 2])
def test_bf16_blocks_compute_twice_with_the_same_weights(recompute: bool | int) -> None:
    """The bf16 copies are no longer in the modules when the backward pass begins; the blocks still use them."""
    model = randomised_model(tiny_model_config())
    recomputing = randomised_model(tiny_model_config(activation_checkpointing=recompute))
    recompute_blocks(recomputing)
    expected, found = (gradients(each, Bf16ViewModel(each)(*BATCH)) for each in (model, recomputing))
    assert expected.keys() == found.keys() == dict(model.named_parameters()).keys()
    for name, gradient in expected.items():
        assert torch.equal(found[name], gradient), name
    assert all(isinstance(weight, nn.Parameter) for weight in recomputing.parameters())


@pytest.mark.parametrize("view", [False, True], ids=["fp32", "bf16 view"])
def test_compiled_in_one_graph(view: bool) -> None:
    models = [randomised_model(tiny_model_config(activation_checkpointing=setting)) for setting in (False, True)]
    recompute_blocks(models[1])
    found = []
    for model in models:
        compute = Bf16ViewModel(model) if view else model
        compiled = torch.compile(compute, backend="aot_eager", fullgraph=True, dynamic=False)
        found.append(gradients(model, compiled(*BATCH)))
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-5, atol=1e-6)


def test_names_of_modules_and_parameters_stay() -> None:
    plain, recomputing = (build_model(tiny_model_config(activation_checkpointing=value), 1) for value in (False, True))
    recompute_blocks(recomputing)
    assert [name for name, _ in recomputing.named_modules()] == [name for name, _ in plain.named_modules()]
    assert recomputing.state_dict().keys() == plain.state_dict().keys()


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_recomputed_dropout_on_a_gpu_keeps_to_the_seeds_of_the_run(gpu: torch.device, compiled: bool) -> None:
    """The same seed gives the same masks in both forward passes, also in compiled code."""
    config = tiny_model_config(n_head=2, n_embd=64, dropout=0.3, activation_checkpointing=True)
    model = randomised_model(config).to(gpu).train()
    recompute_blocks(model)
    compute = torch.compile(model, dynamic=False) if compiled else model
    batch = [tensor.to(gpu) for tensor in BATCH]
    found = []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        loss = compute(*batch)
        model.zero_grad()
        found.append((loss.item(), {name: t.clone() for name, t in gradients(model, loss).items()}))
    assert found[0][0] == found[1][0] != found[2][0]
    for name, gradient in found[0][1].items():
        torch.testing.assert_close(found[1][1][name], gradient, rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
def test_recomputed_gradients_on_a_gpu_are_those_without(gpu: torch.device) -> None:
    found = []
    for setting in (False, True):
        config = tiny_model_config(n_head=2, n_embd=64, dropout=0.3, activation_checkpointing=setting)
        model = randomised_model(config).to(gpu).train()
        recompute_blocks(model)
        torch.manual_seed(5)
        found.append(gradients(model, model.loss(*(tensor.to(gpu) for tensor in BATCH))))
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-4, atol=1e-5)
