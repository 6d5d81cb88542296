"""Allocate the weights under ZeRO-3. At most one whole weight is in memory at a time."""

from collections.abc import Iterator

import torch
import torch.nn as nn
from torch.nn import Parameter

from pipeline.model.gpt2 import GPT2


def use_placeholders(model: GPT2, dtype: torch.dtype) -> None:
    """Replace the weights of a model on the device ``meta`` by placeholders on the CPU.

    An optimizer can be created for placeholders. Each placeholder needs the memory of one element.
    """
    model._apply(lambda weight: torch.empty((), dtype=dtype).expand(weight.shape))  # type: ignore[no-untyped-call]
    model.tie_weights()


class AllocatedOnRead(nn.Module):
    """A module that allocates each parameter of a model only when ``deepspeed.zero.Init`` reads the parameter.

    ``Init`` shards each parameter before it reads the next one. Before you create this module, call
    ``use_placeholders(model, dtype)``.
    """

    def __init__(self, model: GPT2, device: torch.device) -> None:
        super().__init__()
        self.placeholders = list(model.parameters())
        self.device = device

    def parameters(self, recurse: bool = True) -> Iterator[Parameter]:
        """Allocate and yield the parameters of the model one after another. Their values are not initialized."""
        for parameter in self.placeholders:
            parameter.data = torch.empty(parameter.shape, dtype=parameter.dtype, device=self.device)
            yield parameter
