"""Activation checkpointing, applied to a model from outside (Chen et al. 2016)."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
import torch.nn as nn
from torch import Tensor
from torch.nn.utils.stateless import _reparametrize_module
from torch.utils.checkpoint import checkpoint

from pipeline.model.attention import Attend
from pipeline.model.gpt2 import GPT2, Block


def recompute_blocks(model: GPT2) -> None:
    """Let the blocks that ``model.activation_checkpointing`` selects recompute their activations in the backward pass.

    The blocks' ``forward`` is replaced rather than the blocks, so modules and parameters keep their names.
    """
    for layer, block in enumerate(model.h):
        assert isinstance(block, Block)
        if model.config.recomputes_block(layer):
            block.forward = partial(_recompute, block, block.forward)  # type: ignore[method-assign]


def _recompute(block: Block, forward: Callable[..., Tensor], x: Tensor, attend: Attend | None = None) -> Tensor:
    if not torch.is_grad_enabled():
        return forward(x, attend)
    if torch.compiler.is_compiling():  # both passes are in one graph
        return checkpoint(forward, x, attend, use_reentrant=False)
    return checkpoint(forward, x, attend, use_reentrant=False, context_fn=partial(_weights_of_both_passes, block))


def _weights_of_both_passes(block: Block) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Return the contexts of the forward pass and of the recomputation.

    ``Bf16ViewModel`` puts bf16 copies in place of the parameters during its forward pass only, so the recomputation
    has to put them there again.
    """
    weights: dict[str, Tensor] = dict(block.named_parameters())
    copies = {name: weight for name, weight in weights.items() if not isinstance(weight, nn.Parameter)}
    return nullcontext(), _reparametrize_module(block, copies)
