"""Text from a model: sampling token by token."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from pipeline.model import GPT2
from pipeline.seeds import derive_seed


@torch.no_grad()
def generate(
    model: GPT2,
    prompt: list[int],
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    seed: int = 0,
    end_of_text: int | None = None,
) -> Iterator[int]:
    """Continue a prompt, one token id at a time.

    Args:
        model: in evaluation mode.
        prompt: at least one id; only the last ``context_length`` ids are seen.
        temperature: divides the logits; 0 takes the likeliest token each time.
        top_k: draw among the k likeliest; None: among all.
        end_of_text: stop before this id; None: never.
    """
    assert prompt, "an empty prompt has nothing to continue"
    device = model.wte.weight.device
    generator = torch.Generator().manual_seed(derive_seed(seed, "generate"))
    tokens = torch.tensor([prompt], device=device)
    for _ in range(max_new_tokens):
        logits = model(tokens[:, -model.config.context_length :])[0, -1].float().cpu()  # (V,)
        token = _choose(logits, temperature, top_k, generator)
        if token == end_of_text:
            return
        yield token
        tokens = torch.cat((tokens, torch.tensor([[token]], device=device)), dim=1)


def _choose(logits: torch.Tensor, temperature: float, top_k: int | None, generator: torch.Generator) -> int:
    if temperature == 0:
        return int(logits.argmax())
    values, ids = logits.topk(min(top_k or logits.numel(), logits.numel()))
    probabilities = torch.softmax(values / temperature, dim=0)
    return int(ids[torch.multinomial(probabilities, 1, generator=generator)])
