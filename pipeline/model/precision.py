"""Let the model compute in a precision. The dtypes of a precision are the same in every backend.

``fp32``                  everything is in fp32
``amp_bf16``, ``amp_fp16``  fp32 weights and ``torch.autocast``; ``amp_fp16`` also scales the loss
``bf16``                  bf16 weights in forward and backward, fp32 master weights, fp32 gradient accumulation
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
    """A model that computes in one precision. Its ``forward`` has the arguments of :meth:`GPT2.forward`."""

    __call__: Callable[..., Tensor]

    def __init__(self, model: GPT2) -> None:
        super().__init__()
        self.model = model


class AutocastModel(ComputeModel):
    """The model with autocast inside its ``forward``. In the precision ``fp32``, there is no autocast.

    An autocast around the wrapped model would not work in every backend: DeepSpeed turns it off. DeepSpeed's own option
    ``torch_autocast`` is not used either, because in fp16 it clips gradients before it unscales them.
    """

    def __init__(self, model: GPT2, precision: str, device: torch.device) -> None:
        super().__init__(model)
        self.dtype = AUTOCAST_DTYPES.get(precision)
        self.device = device

    def forward(self, *inputs: Any, method: Method = "loss") -> Tensor:
        with torch.autocast(self.device.type, self.dtype) if self.dtype else nullcontext():
            return self.model(*inputs, method=method)


class Bf16ViewModel(ComputeModel):
    """A model that computes with bf16 copies of its fp32 parameters, for backends with whole weights on every rank.

    The parameters are the master weights. The cast to bf16 belongs to the autograd graph, so gradients are accumulated
    and reduced in fp32.
    """

    def forward(self, *inputs: Any, method: Method = "loss") -> Tensor:
        weights = {name: weight.to(torch.bfloat16) for name, weight in self.model.named_parameters()}
        return functional_call(self.model, weights, inputs, {"method": method}, tie_weights=True)


def replicated_compute(model: GPT2, precision: str, device: torch.device) -> ComputeModel:
    """Return the module that runs a model in a precision, for backends that hold the whole fp32 model on every rank."""
    return Bf16ViewModel(model) if precision == "bf16" else AutocastModel(model, precision, device)
