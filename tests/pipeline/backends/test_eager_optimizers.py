"""AdamW gives the same numbers as torch's, and does not import torch's compiler."""

from __future__ import annotations

import functools
import subprocess
import sys

from pipeline.backends.eager_optimizers import without_compiler_wrappers
from tests.support.runs import REPOSITORY


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
