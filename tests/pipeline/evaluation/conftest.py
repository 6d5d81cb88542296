"""Small models, small files of examples, and a small validation split."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data_tools.shards.reader import TokenStream, open_split
from data_tools.tokenizer import Tokenizer, load_tokenizer
from pipeline.config.schema import ModelConfig
from pipeline.distributed.world import World
from pipeline.evaluation.examples import Settings
from pipeline.evaluation.packing import Request
from pipeline.evaluation.scoring import Scorer
from pipeline.evaluation.tasks import prepare_task
from pipeline.evaluation.validation import score_split
from pipeline.model.gpt2 import GPT2
from pipeline.model.precision import replicated_compute
from tests.pipeline.conftest import END_OF_TEXT, randomised_model, tiny_model_config, write_shards

ALONE = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"))
CONTEXT = 40

T = 12  # tokens per window
TOKENS = 131  # 10 windows, and one of 10 targets
UTF8_BYTES = 456

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


HELLASWAG = {
    "activity_label": "Skating",
    "ctx_a": "A man stands on the ice.",
    "ctx_b": "he [substeps] begins",
    "ctx": "A man stands on the ice. he [substeps] begins",
    "endings": ["to  skate. [title] Fine", "to swim in it.", "flies.", "cooks an egg."],
    "label": "2",
}
ARC = {
    "question": "What is wet?",
    "choices": {"text": ["Stone", "Water", "Dust"], "label": ["A", "B", "C"]},
    "answerKey": "B",
}
WINOGRANDE = {
    "sentence": "The cup did not fit the box because the _ was too large.",
    "option1": "cup",
    "option2": "box",
    "answer": "1",
}


def write_lines(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    """Write a file of JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return load_tokenizer()


@pytest.fixture(scope="session")
def text_model() -> GPT2:
    """Return a model in which every weight has an effect, and no two tokens are equally likely."""
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 12, "context_length": CONTEXT}
    return randomised_model(ModelConfig.model_validate(sizes)).eval()


@pytest.fixture(scope="session")
def scorer(text_model: GPT2) -> Scorer:
    return scorer_of(text_model)


def scorer_of(model: GPT2, batch_tokens: int = 256, world: World = ALONE) -> Scorer:
    return Scorer(replicated_compute(model, "fp32", world.device).eval(), model.config, world, batch_tokens)


@torch.no_grad()
def plain_score(model: GPT2, request: Request) -> tuple[float, bool]:
    """Score a request the slow way: one forward pass per token, over all tokens before it that fit the context."""
    tokens = [*request.context, *request.continuation]
    tokens = tokens[-(model.config.context_length + 1) :]
    total, greedy = 0.0, True
    for at in range(len(tokens) - len(request.continuation), len(tokens)):
        logits = model.logits(torch.tensor([tokens[:at]]))[0, -1].double()
        total += (logits[tokens[at]] - logits.logsumexp(0)).item()
        greedy &= int(logits.argmax()) == tokens[at]
    return total, greedy


def measure(scorer: Scorer, name: str, path: Path, **settings: Any) -> dict[str, Any]:
    return prepare_task(name, str(path), Settings(**settings), scorer.model, ALONE).measure(scorer)[0]


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokens = np.random.default_rng(0).integers(0, END_OF_TEXT, TOKENS)
    tokens[[0, 40, 41, 90]] = END_OF_TEXT
    folder = tmp_path_factory.mktemp("evaluation") / "data"
    return write_shards(folder, {"train": [tokens], "val": [tokens[:50], tokens[50:]]}, UTF8_BYTES)


@pytest.fixture(scope="session")
def stream(data: Path) -> TokenStream:
    return open_split(data, "val")


@pytest.fixture(scope="session")
def model() -> GPT2:
    return randomised_model(tiny_model_config()).eval()


@pytest.fixture(scope="session")
def results(model: GPT2, stream: TokenStream) -> dict[str, Any]:
    return score(model, stream, 4)


def score(model: GPT2, stream: TokenStream, batch_size: int, world: World = ALONE) -> dict[str, Any]:
    return score_split(replicated_compute(model, "fp32", world.device).eval(), stream, T, batch_size, world)
