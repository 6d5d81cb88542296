"""Sampling settings, and generating for one prompt, as many tests do."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pipeline.config.schema import SampleConfig
from pipeline.generation.generate import Decoder, generate_batch
from pipeline.model.gpt2 import GPT2


def sampling(max_new_tokens: int = 1, **options: Any) -> SampleConfig:
    """Return settings that draw from the model's own distribution, unless the options limit it."""
    return SampleConfig(**{"max_new_tokens": max_new_tokens, "temperature": 1.0, "top_k": None, **options})


def generate(
    model: GPT2,
    prompt: list[int],
    max_new_tokens: int,
    *,
    seed: int = 0,
    end_of_text: int | None = None,
    **options: Any,
) -> Iterator[int]:
    """Yield the tokens that ``generate_batch`` generates for one prompt."""
    sample = sampling(max_new_tokens, **options)
    for tokens in generate_batch(
        Decoder(model), [prompt], sample, seed=seed, ends=set() if end_of_text is None else {end_of_text}
    ):
        yield tokens[0]
