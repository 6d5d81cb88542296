"""The output layer and the loss on it: where a small model spends half of its time, and most of its memory."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

IGNORE_INDEX = -100  # a target that is not scored; torch's own default
VOCAB_MULTIPLE = 128  # matrix products are faster on round sizes: 50257 becomes 50304
CHUNK_ROWS = 128  # logits of so many tokens stay in a CPU's cache between product and softmax


def padded_vocab_size(vocab_size: int) -> int:
    """Rows of the embedding: the vocabulary rounded up. The surplus never enters the softmax."""
    return -(-vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE


class OutputLayer(nn.Linear):
    """Hidden states to logits, or at once to the summed cross-entropy.

    Compiled, the softmax is fused behind the product, the padding left out inside the fusion.
    """

    def __init__(self, width: int, vocab_size: int) -> None:
        super().__init__(width, padded_vocab_size(vocab_size), bias=False)
        self.vocab_size = vocab_size

    def forward(self, hidden: Tensor, targets: Tensor | None = None, *, each: bool = False) -> Tensor:
        """Logits, (..., V) in the compute dtype; the fp32 sum over scored targets, in nats; or how ``each`` one fares.

        Args:
            hidden: (B, T, C); with ``each`` (N, C).
            targets: (B, T) int64 ids, ``IGNORE_INDEX`` where nothing is scored; with ``each`` (N,) ids.
            each: not the sum, but (2, N) fp32: each target's log-probability; 1 where no token is likelier, else 0.
        """
        if targets is not None and each:
            return self._fare_in_chunks(hidden, targets)
        if targets is not None and self._pays_in_chunks(hidden):
            return self._loss_in_chunks(hidden.flatten(0, 1), targets.flatten())
        logits = super().forward(hidden)[..., : self.vocab_size]
        if targets is None:
            return logits
        losses = F.cross_entropy(
            logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORE_INDEX, reduction="none"
        )
        return losses.sum()  # torch sums pairwise: the error stays at the rounding of one addition

    def _fare_in_chunks(self, hidden: Tensor, targets: Tensor) -> Tensor:
        # The loop is in here and not around the layer: FSDP and ZeRO-3 gather its weight once a call.
        parts = zip(torch.split(hidden, CHUNK_ROWS), torch.split(targets, CHUNK_ROWS), strict=True)
        return torch.cat([_fare(nn.Linear.forward(self, x)[:, : self.vocab_size], y) for x, y in parts], dim=1)

    @staticmethod
    def _pays_in_chunks(hidden: Tensor) -> bool:
        """On a CPU without compilation; not in fp16, whose small gradients need the loss scale from the first."""
        dtype = _compute_dtype(hidden)
        return hidden.device.type == "cpu" and dtype != torch.float16 and not torch.compiler.is_compiling()

    def _loss_in_chunks(self, hidden: Tensor, targets: Tensor) -> Tensor:
        dtype = _compute_dtype(hidden)
        with torch.autocast(hidden.device.type, enabled=False):
            losses = _ChunkedCrossEntropy.apply(  # type: ignore[no-untyped-call]
                hidden.to(dtype), self.weight.to(dtype), targets, self.vocab_size, torch.is_grad_enabled()
            )
        assert isinstance(losses, Tensor)
        return losses.sum()


def _fare(logits: Tensor, targets: Tensor) -> Tensor:
    """Of (n, V) logits and (n,) targets the (2, n) pairs of ``OutputLayer.forward``."""
    log_probabilities = torch.log_softmax(logits.float(), dim=1).gather(1, targets.unsqueeze(1)).squeeze(1)
    return torch.stack((log_probabilities, (logits.argmax(1) == targets).float()))


def _compute_dtype(hidden: Tensor) -> torch.dtype:
    kind = hidden.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Cross-entropy of each row, some rows at a time, so that fp32 logits never exist as a whole.

    The forward pass already makes the gradient of the logits, softmax minus target, in their dtype (Hsu et al. 2024,
    "Liger Kernel", section 3.2); products with it wait for the backward pass.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, vocab_size: int, with_grad: bool) -> Tensor:
        """(N,) fp32 losses of hidden states (N, C) and targets (N,); 0 where nothing is scored."""
        losses = torch.empty(len(hidden), dtype=torch.float32)
        gradient = hidden.new_empty(len(hidden) if with_grad else 0, len(weight))
        for start in range(0, len(hidden), CHUNK_ROWS):
            rows = slice(start, start + CHUNK_ROWS)
            logits = (hidden[rows] @ weight.T)[:, :vocab_size].float()
            scored = targets[rows] != IGNORE_INDEX
            ids = targets[rows].clamp(min=0)[:, None]
            log_sums = logits.logsumexp(dim=1, keepdim=True)
            losses[rows] = torch.where(scored, (log_sums - logits.gather(1, ids)).squeeze(1), 0.0)
            if with_grad:
                softmax = logits.sub_(log_sums).exp_()
                softmax.scatter_add_(1, ids, softmax.new_full(ids.shape, -1.0))
                softmax.masked_fill_(~scored[:, None], 0.0)
                gradient[rows, :vocab_size] = softmax
                gradient[rows, vocab_size:] = 0.0
        ctx.save_for_backward(hidden, weight, gradient)
        return losses

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *of_losses: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of hidden states and weight."""
        hidden, weight, gradient = ctx.saved_tensors
        factors = of_losses[0].to(hidden.dtype)[:, None]  # (N, 1)
        of_hidden = (gradient @ weight) * factors
        of_weight = gradient.T @ (hidden * factors)
        return of_hidden, of_weight, None, None, None
