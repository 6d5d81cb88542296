"""Allocate the weights under ZeRO-3 one after another, so that at most one whole weight is in memory at a time.

DeepSpeed divides each weight among the ranks before the next weight is allocated.
"""

from collections.abc import Iterator

import torch
import torch.nn as nn
from torch.nn import Parameter

from pipeline.model.gpt2 import GPT2


def use_placeholders(model: GPT2, dtype: torch.dtype) -> None:
    """Replace the weights of a model on the device ``meta`` by placeholders on the CPU.

    A placeholder has the shape of the weight but needs the memory of only one element. An optimizer, such as torch's
    fused AdamW, can be created for placeholders.
    """
    model._apply(lambda weight: torch.empty((), dtype=dtype).expand(weight.shape))  # type: ignore[no-untyped-call]
    model.tie_weights()


class AllocatedOnRead(nn.Module):
    """A module that ``deepspeed.zero.Init`` gets instead of the model.

    ``Init`` reads the parameters of its argument ``module`` one after another, and divides each among the ranks before
    it reads the next. This class allocates a parameter of the model when ``Init`` reads it. Therefore, at most one
    whole parameter is in memory at a time.

    Args:
        model: a model on which ``use_placeholders`` was called.
        device: the device on which the parameters are divided.
    """

    def __init__(self, model: GPT2, device: torch.device) -> None:
        super().__init__()
        self.placeholders = list(model.parameters())
        self.device = device

    def parameters(self, recurse: bool = True) -> Iterator[Parameter]:
        """Yield the parameters of the model.

        Each parameter is allocated just before it is yielded. Its values are not initialized.
        """
        for parameter in self.placeholders:
            parameter.data = torch.empty(parameter.shape, dtype=parameter.dtype, device=self.device)
            yield parameter
