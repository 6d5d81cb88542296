"""A prompt continued by a checkpoint: tokenizer, model and sampling together."""

from __future__ import annotations

from pathlib import Path

import torch

from data_tools.tokenizer import END_OF_TEXT, load_tokenizer
from pipeline.config import SampleConfig
from pipeline.evaluation.tasks import load_model
from pipeline.generation import generate


def continue_prompt(checkpoint: Path, sample: SampleConfig, seed: int, device: torch.device) -> str:
    """The prompt and what the model writes after it, up to ``<|endoftext|>``.

    Raises:
        CheckpointError: there is no good checkpoint at ``checkpoint``.
    """
    loaded = load_model(checkpoint, device)
    tokenizer = load_tokenizer()
    prompt = tokenizer.encode(sample.prompt).tolist()
    tokens = generate(
        loaded.model,
        prompt,
        sample.max_new_tokens,
        temperature=sample.temperature,
        top_k=sample.top_k,
        seed=seed,
        end_of_text=END_OF_TEXT,
    )
    return tokenizer.decode([*prompt, *tokens])
