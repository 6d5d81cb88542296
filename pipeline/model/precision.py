"""Run the model in one of these precisions. A precision uses the same dtypes in every backend.

``fp32``                    fp32 for everything
``amp_bf16``, ``amp_fp16``  fp32 weights and ``torch.autocast``; ``amp_fp16`` also scales the loss
``bf16``                    bf16 weights in forward and backward, fp32 master weights, fp32 gradient accumulation
"""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor
from torch.func import functional_call

from pipeline.model.gpt2 import GPT2
from pipeline.model.output_layer import Method

AUTOCAST_DTYPES = {"amp_bf16": torch.bfloat16, "amp_fp16": torch.float16}


class ComputeModel(nn.Module):
    """A wrapper that runs a GPT-2 in one precision of the table at the top of this module.

    Its ``forward`` has the arguments of ``GPT2.forward``.
    """

    __call__: Callable[..., Tensor]

    def __init__(self, model: GPT2) -> None:
        super().__init__()
        self.model = model


class AutocastModel(ComputeModel):
    """A model that uses autocast inside its ``forward``. In the precision ``fp32``, it uses no autocast.

    DeepSpeed turns off autocast that is active outside ``forward``, but not autocast inside ``forward``. DeepSpeed's
    own option ``torch_autocast`` is not used. With this option, DeepSpeed clips fp16 gradients before it unscales them.
    """

    def __init__(self, model: GPT2, precision: str, device: torch.device) -> None:
        super().__init__(model)
        self.dtype = AUTOCAST_DTYPES.get(precision)
        self.device = device

    def forward(self, *inputs: Any, method: Method = "loss") -> Tensor:
        with torch.autocast(self.device.type, self.dtype) if self.dtype else nullcontext():
            return self.model(*inputs, method=method)


class Bf16ViewModel(ComputeModel):
    """A model that computes with bf16 copies of its fp32 parameters. Every rank must hold all parameters.

    The cast to bf16 belongs to the autograd graph. Gradients are therefore accumulated and reduced in fp32.
    """

    def forward(self, *inputs: Any, method: Method = "loss") -> Tensor:
        weights = {name: weight.to(torch.bfloat16) for name, weight in self.model.named_parameters()}
        return functional_call(self.model, weights, inputs, {"method": method}, tie_weights=True)


def replicated_compute(model: GPT2, precision: str, device: torch.device) -> ComputeModel:
    """Wrap a model in a module that computes in the given precision. The rank must hold the whole fp32 model."""
    return Bf16ViewModel(model) if precision == "bf16" else AutocastModel(model, precision, device)
