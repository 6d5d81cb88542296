"""Text that the model writes while it trains, by the forward pass of whatever backend trains it."""

from __future__ import annotations

import torch

from data_tools.tokenizer import END_OF_TEXT, load_tokenizer
from pipeline.backends import Backend
from pipeline.config.schema import Config
from pipeline.distributed.world import World
from pipeline.generation.sampling import Sampling, draw
from pipeline.seeds import derive_seed


def write_sample(backend: Backend, config: Config, world: World) -> str:
    """The prompt of ``sample`` and what follows, up to ``<|endoftext|>``. Collective; in ``backend.evaluation_mode()``.

    Each token takes a pass over the whole text: a wrapped model has no memory of keys and values. None is left out
    after an early end, since a rank that passed less often than the others would leave them waiting.
    """
    sample, tokenizer = config.sample, load_tokenizer()
    sampling = Sampling(sample.temperature, sample.top_k, sample.top_p)
    generator = torch.Generator().manual_seed(derive_seed(config.run.seed, "sample"))
    text = tokenizer.encode(sample.prompt).tolist()
    new: list[int] = []
    for _ in range(sample.max_new_tokens):
        window = torch.tensor([[*text, *new][-config.model.context_length :]], device=world.device)
        new.append(draw(backend.logits(window)[0, -1].float().cpu(), sampling, generator))
    return sample.prompt + tokenizer.decode(new[: new.index(END_OF_TEXT)] if END_OF_TEXT in new else new)
