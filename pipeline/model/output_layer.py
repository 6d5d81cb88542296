"""Define the output layer and the loss."""

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from pipeline.model.blocked_loss import blocked_cross_entropy

IGNORE_INDEX = -100  # marks a target that is not scored; torch's default
VOCAB_MULTIPLE = 128  # matrix products are faster with multiples of this number: 50257 becomes 50304
SCORED_AT_ONCE = 128  # the logits of 128 targets take 26 MB in fp32, and fit into the caches of a CPU

Method = Literal["loss", "logits", "score"]


def padded_vocab_size(vocab_size: int) -> int:
    """Return the vocabulary size, rounded up to a multiple of ``VOCAB_MULTIPLE``.

    This is the number of rows of the token embedding. The softmax ignores the logits of padding rows.
    """
    return -(-vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE


class OutputLayer(nn.Linear):
    """The linear layer that computes logits from hidden states, and also the loss. torch.compile can fuse both."""

    __call__: Callable[..., Tensor]

    def __init__(self, width: int, vocab_size: int) -> None:
        super().__init__(width, padded_vocab_size(vocab_size), bias=False)
        self.vocab_size = vocab_size
        self.loss_in_blocks: Literal["kept", True, False] = False  # see pipeline/model/blocked_loss.py
        self.packed_product: Callable[[Tensor], Tensor] | None = None  # see pipeline/model/packed_linear.py

    def forward(self, *inputs: Tensor, method: Method = "loss") -> Tensor:
        """Call the method ``loss``, ``logits`` or ``score`` with ``inputs``, and return its result.

        Do not call these methods directly. FSDP2, DeepSpeed and torch.compile work only in ``forward``.
        """
        result: Tensor = getattr(self, method)(*inputs)
        return result

    def loss(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Return the sum of the cross-entropies of all targets in nats, an fp32 scalar.

        Args:
            hidden: shape (B, T, C).
            targets: (B, T) int64 ids. Targets that are ``IGNORE_INDEX`` do not count.
        """
        targets = targets.flatten()
        if self.loss_in_blocks:
            device = hidden.device.type
            dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else self.weight.dtype
            states, weight = hidden.flatten(0, 1).to(dtype), self.weight.to(dtype)
            keep = self.loss_in_blocks == "kept"
            losses = blocked_cross_entropy(states, weight, targets, self.vocab_size, IGNORE_INDEX, keep=keep)
        else:
            losses = cross_entropy(self._padded_logits(hidden).flatten(0, 1), targets, self.vocab_size)
        return losses.sum()  # torch sums pairwise, so rounding errors stay small

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the logits, shape (..., V), in the compute dtype. ``hidden`` has shape (..., C)."""
        return self._padded_logits(hidden)[..., : self.vocab_size]

    def score(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Return each target's log-probability in nats, and its rank among all tokens, fp32 of shape (2, N).

        The logits of at most ``SCORED_AT_ONCE`` targets are in memory at the same time.

        Args:
            hidden: shape (N, C).
            targets: (N,) int64 ids.
        """
        # The loop is inside the layer, because FSDP2 and ZeRO-3 gather the weight once per call of the layer.
        pieces = zip(torch.split(hidden, SCORED_AT_ONCE), torch.split(targets, SCORED_AT_ONCE), strict=True)
        return torch.cat([score_targets(self._padded_logits(x), y, self.vocab_size) for x, y in pieces], dim=1)

    def _padded_logits(self, hidden: Tensor) -> Tensor:
        return super().forward(hidden) if self.packed_product is None else self.packed_product(hidden)


def cross_entropy(logits: Tensor, targets: Tensor, vocab_size: int) -> Tensor:
    """Return the cross-entropy of each target in nats, fp32 of shape (N,). A target ``IGNORE_INDEX`` gives 0.

    Args:
        logits: shape (N, padded vocabulary size), in any dtype. Columns from ``vocab_size`` on are padding.
        targets: (N,) int64 ids.
    """
    if torch.compiler.is_compiling():
        losses: Tensor = _CompiledCrossEntropy.apply(logits, targets, vocab_size)  # type: ignore[no-untyped-call]
        return losses
    return F.cross_entropy(logits[:, :vocab_size].float(), targets, ignore_index=IGNORE_INDEX, reduction="none")


class _CompiledCrossEntropy(torch.autograd.Function):
    """Cross-entropy for compiled code. Unlike torch's, its backward pass does not sum over the vocabulary."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, vocab_size: int) -> Tensor:
        scored = targets != IGNORE_INDEX
        columns = targets.clamp(min=0)
        x = logits[:, :vocab_size].float()
        log_totals = x.logsumexp(dim=1)
        ctx.save_for_backward(logits, columns, scored, log_totals)
        ctx.vocab_size = vocab_size
        chosen = x.gather(1, columns.unsqueeze(1)).squeeze(1)
        return torch.where(scored, log_totals - chosen, 0.0)

    @staticmethod
    def backward(ctx: Any, grad_losses: Tensor) -> tuple[Tensor, None, None]:
        logits, columns, scored, log_totals = ctx.saved_tensors
        weights = torch.where(scored, grad_losses, 0.0).unsqueeze(1)
        ids = torch.arange(logits.shape[1], device=logits.device, dtype=torch.int32)
        softmax = (logits.float() - log_totals.unsqueeze(1)).exp()  # (N, padded vocabulary)
        one_hot = (ids == columns.int().unsqueeze(1)).float()
        gradient = torch.where(ids < ctx.vocab_size, (softmax - one_hot) * weights, 0.0)
        return gradient.to(logits.dtype), None, None


def score_targets(logits: Tensor, targets: Tensor, vocab_size: int) -> Tensor:
    """Return each target's log-probability in nats, and its rank among all tokens, fp32 of shape (2, n).

    The most likely token has rank 0. If tokens are equally likely, the token with the lower id comes first, as in
    ``torch.argmax`` on a CPU.

    Args:
        logits: shape (n, padded vocabulary size). Columns from ``vocab_size`` on are padding.
        targets: (n,) int64 ids.
    """
    logits = logits.float()  # also for comparisons, which take longer in bf16 on a CPU
    logits[:, vocab_size:] = -math.inf  # a slice without padding would be copied
    columns = targets.unsqueeze(1)
    log_probabilities = torch.log_softmax(logits, dim=1).gather(1, columns)
    chosen = logits.gather(1, columns)  # (n, 1)
    below = torch.nextafter(chosen, torch.full_like(chosen, -math.inf))  # x > below is the same as x >= chosen
    ids = torch.arange(logits.shape[1], device=logits.device)
    is_before = logits > torch.where(ids < columns, below, chosen)
    return torch.cat((log_probabilities, is_before.sum(1, keepdim=True, dtype=torch.int32)), dim=1).T
