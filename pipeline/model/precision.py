"""The dtypes in which the model computes, the same in every backend.

``fp32``                  everything in fp32
``amp_bf16``, ``amp_fp16``  fp32 weights, ``torch.autocast``; fp16 also scales the loss
``bf16``                  bf16 weights in forward and backward; fp32 master weights, fp32 gradient accumulation
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
    """A model in one precision; its ``forward`` is that of :class:`GPT2`."""

    __call__: Callable[..., Tensor]

    def __init__(self, model: GPT2) -> None:
        super().__init__()
        self.model = model


class AutocastModel(ComputeModel):
    """The model with autocast *inside* its forward, where no wrapper can switch it off; without autocast for fp32.

    DeepSpeed disables an autocast around its engine, and its own (``torch_autocast``) clips gradients before it
    unscales them under fp16.
    """

    def __init__(self, model: GPT2, precision: str, device: torch.device) -> None:
        super().__init__(model)
        self.dtype = AUTOCAST_DTYPES.get(precision)
        self.device = device

    def forward(self, *inputs: Any, method: Method = "loss") -> Tensor:
        with torch.autocast(self.device.type, self.dtype) if self.dtype else nullcontext():
            return self.model(*inputs, method=method)


class Bf16ViewModel(ComputeModel):
    """The model with bf16 copies in place of its fp32 parameters, for backends that replicate the weights.

    The parameters are the master weights. The cast is in the graph, so gradients accumulate and are reduced in fp32.
    """

    def forward(self, *inputs: Any, method: Method = "loss") -> Tensor:
        weights = {name: weight.to(torch.bfloat16) for name, weight in self.model.named_parameters()}
        return functional_call(self.model, weights, inputs, {"method": method}, tie_weights=True)


def replicated_compute(model: GPT2, precision: str, device: torch.device) -> ComputeModel:
    """Return the module to call where every rank holds the whole fp32 model."""
    return Bf16ViewModel(model) if precision == "bf16" else AutocastModel(model, precision, device)
