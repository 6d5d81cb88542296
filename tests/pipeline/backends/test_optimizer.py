"""AdamW decays matrices only, has the settings of the config, and uses the fused implementation."""

from __future__ import annotations

import logging

import pytest
import torch

from pipeline.backends import optimizer as optimizer_module
from pipeline.backends.optimizer import build_adamw, parameter_groups, set_learning_rate
from pipeline.config.schema import OptimizerConfig
from pipeline.model.gpt2 import build_model
from tests.pipeline.conftest import tiny_model_config

CPU = torch.device("cpu")


def test_only_matrices_decay() -> None:
    model = build_model(tiny_model_config(), 1)
    adamw = build_adamw(model.parameters(), OptimizerConfig(weight_decay=0.25), CPU)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decay = {names[id(p)]: group["weight_decay"] for group in adamw.param_groups for p in group["params"]}
    assert len(decay) == len(names)
    for name, weight_decay in decay.items():
        spared = name.endswith("bias") or "ln_" in name
        assert weight_decay == (0.0 if spared else 0.25), name


def test_the_tied_weight_is_there_once() -> None:
    model = build_model(tiny_model_config(), 1)
    groups = parameter_groups(model.parameters(), 0.1)
    assert sum(p is model.wte.weight for group in groups for p in group["params"]) == 1


def test_decay_shrinks_matrices_and_nothing_else() -> None:
    """With gradients of zero AdamW only decays: p <- p (1 - lr decay)."""
    matrix, bias = torch.nn.Parameter(torch.ones(2, 2)), torch.nn.Parameter(torch.ones(2))
    adamw = build_adamw([matrix, bias], OptimizerConfig(learning_rate=0.1, weight_decay=0.5), CPU)
    matrix.grad, bias.grad = torch.zeros(2, 2), torch.zeros(2)
    adamw.step()
    torch.testing.assert_close(matrix.detach(), torch.full((2, 2), 0.95))
    assert (bias == 1.0).all()


def test_settings_reach_adamw() -> None:
    config = OptimizerConfig(learning_rate=3e-4, betas=(0.8, 0.9), eps=1e-6)
    defaults = build_adamw([torch.nn.Parameter(torch.ones(2))], config, CPU).defaults
    assert (defaults["lr"], defaults["betas"], defaults["eps"]) == (3e-4, (0.8, 0.9), 1e-6)
    assert defaults["fused"]


def test_a_device_without_fused_adamw_is_logged(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(optimizer_module, "FUSED_DEVICES", ())
    with caplog.at_level(logging.WARNING):
        adamw = build_adamw([torch.nn.Parameter(torch.ones(2))], OptimizerConfig(), CPU)
    assert not adamw.defaults["fused"]
    assert "not available on cpu" in caplog.text


def test_the_learning_rate_is_set_everywhere() -> None:
    adamw = build_adamw(build_model(tiny_model_config(), 1).parameters(), OptimizerConfig(), CPU)
    set_learning_rate(adamw.param_groups, 0.125)
    assert [group["lr"] for group in adamw.param_groups] == [0.125, 0.125]
