"""Generating for one prompt, as many tests do."""

from __future__ import annotations

from collections.abc import Iterator

from pipeline.generation.generate import generate_batch
from pipeline.generation.sampling import Sampling
from pipeline.model.gpt2 import GPT2


def generate(
    model: GPT2,
    prompt: list[int],
    max_new_tokens: int,
    *,
    seed: int = 0,
    end_of_text: int | None = None,
    **sampling: float | None,
) -> Iterator[int]:
    """Yield the tokens that ``generate_batch`` generates for one prompt."""
    options = Sampling(**sampling)  # type: ignore[arg-type]
    for tokens in generate_batch(model, [prompt], max_new_tokens, options, seed=seed, end_of_text=end_of_text):
        yield tokens[0]
