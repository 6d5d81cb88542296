"""Drawing one token from logits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """The distribution that tokens are drawn from."""

    temperature: float = 1.0  # divides the logits; 0: always the likeliest token
    top_k: int | None = None  # draw among the k likeliest; None: among all
    top_p: float | None = None  # draw among the likeliest that together reach this probability; None: among all


def draw(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """Return the id of one token.

    ``top_k`` applies before ``top_p`` (nucleus sampling, Holtzman et al. 2020), which keeps the fewest tokens,
    likeliest first, that together reach the probability. At least one token is kept.

    Args:
        logits: (V,) fp32 on the CPU.
        generator: on the CPU; not used at temperature 0.
    """
    if sampling.temperature == 0:
        return int(logits.argmax())
    if sampling.top_k is not None and sampling.top_k < logits.numel():
        logits, ids = logits.topk(sampling.top_k)
    elif sampling.top_p is not None:
        logits, ids = logits.sort(descending=True, stable=True)
    else:
        ids = torch.arange(logits.numel())
    probabilities = torch.softmax(logits / sampling.temperature, dim=0)
    if sampling.top_p is not None:
        before = probabilities.cumsum(0) - probabilities  # the probability of all likelier tokens together
        probabilities = probabilities.masked_fill(before >= sampling.top_p, 0.0)
    return int(ids[torch.multinomial(probabilities, 1, generator=generator)])
