"""A small model of GPT-2's vocabulary, and small files of examples."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from data_tools.tokenizer import Tokenizer, load_tokenizer
from pipeline.config.schema import ModelConfig
from pipeline.distributed.world import World
from pipeline.evaluation.requests import Request
from pipeline.evaluation.scoring import Scorer
from pipeline.model.gpt2 import GPT2
from pipeline.model.precision import AutocastModel
from tests.pipeline.conftest import restless_model

ALONE = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"))
CONTEXT = 40

PIQA = [
    {"goal": "Dry wet shoes", "sol1": "Put them in paper.", "sol2": "Put them in water, at once.", "label": 0},
    {"goal": "Open a jar", "sol1": "Sing", "sol2": "Turn the lid to the left until it gives way.", "label": 1},
    {"goal": "Keep bread fresh", "sol1": "Wrap it in cloth.", "sol2": "Wrap it in ice.", "label": 0},
    {"goal": "Écrire", "sol1": "une lettre à l'été", "sol2": "ñandú", "label": 1},
    {"goal": "Find north", "sol1": "Look for the pole star.", "sol2": "Look for the moon.", "label": 0},
    {"goal": "Sharpen a knife " * 12, "sol1": "Use a whetstone.", "sol2": "Use a feather.", "label": 0},
]
LAMBADA = [
    {"text": "The cat sat on the mat, and the dog sat on the other mat"},
    {"text": "She opened the door, and behind the door stood her brother"},
    {"text": "One, two, three, four, five, six, seven, eight, nine, ten, eleven twelve " * 4 + "thirteen"},
]


def write_lines(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    """A file of JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return load_tokenizer()


@pytest.fixture(scope="session")
def text_model() -> GPT2:
    """Every weight of it counts, and none of two words is equally likely."""
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 12, "context_length": CONTEXT}
    return restless_model(ModelConfig.model_validate(sizes)).eval()


@pytest.fixture(scope="session")
def scorer(text_model: GPT2) -> Scorer:
    return scorer_of(text_model)


def scorer_of(model: GPT2, batch_tokens: int = 256, world: World = ALONE) -> Scorer:
    return Scorer(AutocastModel(model, "fp32", world.device).eval(), model.config, world, batch_tokens)


@torch.no_grad()
def plain_score(model: GPT2, request: Request) -> tuple[float, bool]:
    """The slowest way: a forward pass for each token, over all that the model may see of what is before it."""
    tokens = [*request.context, *request.continuation]
    tokens = tokens[-(model.config.context_length + 1) :]
    total, greedy = 0.0, True
    for at in range(len(tokens) - len(request.continuation), len(tokens)):
        logits = model.logits(torch.tensor([tokens[:at]]))[0, -1].double()
        total += (logits[tokens[at]] - logits.logsumexp(0)).item()
        greedy &= int(logits.argmax()) == tokens[at]
    return total, greedy
