"""A prompt continued by a checkpoint: tokenizer, model and sampling together."""

from __future__ import annotations

from pathlib import Path

import torch

from data_tools.tokenizer import END_OF_TEXT, GPT2_VOCAB_SIZE, load_tokenizer
from pipeline.config import SampleConfig
from pipeline.errors import CheckpointError
from pipeline.evaluation.tasks import load_model
from pipeline.generation import generate


def continue_prompt(checkpoint: Path, sample: SampleConfig, seed: int, device: torch.device) -> str:
    """The prompt and what the model writes after it, up to ``<|endoftext|>``.

    Raises:
        CheckpointError: there is no good checkpoint at ``checkpoint``, or its ids are not GPT-2's.
    """
    loaded = load_model(checkpoint, device)
    if loaded.config.model.vocab_size != GPT2_VOCAB_SIZE:
        raise CheckpointError(
            f"{loaded.checkpoint}: model.vocab_size is {loaded.config.model.vocab_size}; "
            f"text needs a model of GPT-2's vocabulary, {GPT2_VOCAB_SIZE}"
        )
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
