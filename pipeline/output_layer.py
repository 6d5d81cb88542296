"""The output layer and the loss on it: where a small model spends half of its time, and most of its memory."""

from __future__ import annotations

import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

IGNORE_INDEX = -100  # a target that is not scored; torch's own default
VOCAB_MULTIPLE = 128  # matrix products are faster on round sizes: 50257 becomes 50304


def padded_vocab_size(vocab_size: int) -> int:
    """Rows of the embedding: the vocabulary rounded up. The surplus never enters the softmax."""
    return -(-vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE


class OutputLayer(nn.Linear):
    """Hidden states to logits, or at once to the summed cross-entropy.

    One module, so that a backend that compiles module by module gets the loss fused too: over logits in the compute
    dtype, the padding left out by the same loop.
    """

    def __init__(self, width: int, vocab_size: int) -> None:
        super().__init__(width, padded_vocab_size(vocab_size), bias=False)
        self.vocab_size = vocab_size

    def forward(self, hidden: Tensor, targets: Tensor | None = None) -> Tensor:
        """Logits, (B, T, V) in the compute dtype; or the fp32 sum over scored targets, in nats.

        Args:
            hidden: (B, T, C).
            targets: (B, T) int64 ids; ``IGNORE_INDEX`` where nothing is scored.
        """
        logits = super().forward(hidden)[..., : self.vocab_size]
        if targets is None:
            return logits
        losses = F.cross_entropy(
            logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORE_INDEX, reduction="none"
        )
        return losses.sum()  # torch sums pairwise: the error stays at the rounding of one addition
