"""Apply activation checkpointing (Chen et al. 2016): recompute activations in the backward pass to save memory."""

from functools import partial

import torch
import torch._functorch.config as functorch_config
import torch.nn as nn
from torch import Tensor
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from pipeline.model.attention import Attend
from pipeline.model.gpt2 import GPT2, Block


def recompute_blocks(model: GPT2) -> None:
    """Make the blocks that ``model.activation_checkpointing`` selects recompute their activations.

    All modules and parameters keep their names.
    """
    # Without this setting, compiled blocks would not draw dropout masks from the seeds of the micro-batches. The
    # setting applies to the whole process.
    functorch_config.graphsafe_rng_functionalization = False
    for layer, block in enumerate(model.h):
        assert isinstance(block, Block)
        if model.config.recomputes_block(layer):
            block.forward = partial(_recompute, _PlainBlock(block))  # type: ignore[method-assign]


class _PlainBlock(nn.Module):
    """Computes the block's original ``forward``, without the block's hooks."""

    def __init__(self, block: Block) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor, attend: Attend | None) -> Tensor:
        return Block.forward(self.block, x, attend)


def _recompute(plain: _PlainBlock, x: Tensor, attend: Attend | None = None) -> Tensor:
    if not torch.is_grad_enabled():
        return Block.forward(plain.block, x, attend)
    if torch.compiler.is_compiling():  # the first and the repeated forward pass are in one graph
        return checkpoint(plain, x, attend, use_reentrant=False)
    # The repeated forward pass must use the bf16 copies, too. Bf16ViewModel sets them only during its forward pass.
    copies = {name: weight for name, weight in plain.named_parameters() if not isinstance(weight, nn.Parameter)}
    return checkpoint(functional_call, plain, copies, (x, attend), use_reentrant=False)
