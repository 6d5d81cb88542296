"""A prompt and what a checkpoint writes after it, as text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from data_tools.tokenizer import GPT2_VOCAB_SIZE
from pipeline.backends.ddp import DdpBackend
from pipeline.checkpoint import TrainingState, save_checkpoint
from pipeline.config.loading import dump_config
from pipeline.config.schema import SampleConfig
from pipeline.distributed.world import World
from pipeline.errors import CheckpointError
from pipeline.generation.writer import continue_prompt
from pipeline.model.gpt2 import build_model
from tests.pipeline.conftest import VOCAB_SIZE, tiny_config

CPU = torch.device("cpu")
PROMPT = "Grüße, world"


def save_model(run_folder: Path, world: World, vocab_size: int) -> Path:
    config = tiny_config(run_folder, model={"vocab_size": vocab_size})
    backend = DdpBackend(build_model(config.model, 1), config, world)
    save_checkpoint(run_folder, TrainingState(1, 4, 48, 1, 1.0, 0, 1337), dump_config(config), backend, world, 1)
    return run_folder


@pytest.fixture
def run_folder(tmp_path: Path, world: World) -> Path:
    return save_model(tmp_path, world, GPT2_VOCAB_SIZE)


def sample(**options: Any) -> SampleConfig:
    return SampleConfig(prompt=PROMPT, **{"max_new_tokens": 5, **options})


def test_the_prompt_is_continued_by_so_many_tokens(run_folder: Path) -> None:
    text = continue_prompt(run_folder, sample(temperature=0.0), seed=0, device=CPU)
    assert text.startswith(PROMPT)
    shorter = continue_prompt(run_folder, sample(temperature=0.0, max_new_tokens=2), seed=0, device=CPU)
    assert len(PROMPT) < len(shorter) < len(text)


def test_the_seed_and_the_settings_reach_the_draws(run_folder: Path) -> None:
    texts = [continue_prompt(run_folder, sample(), seed, CPU) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    greedy = continue_prompt(run_folder, sample(temperature=0.0), seed=0, device=CPU)
    assert continue_prompt(run_folder, sample(top_k=1), seed=3, device=CPU) == greedy


def test_a_model_of_another_vocabulary_is_refused(tmp_path: Path, world: World) -> None:
    run_folder = save_model(tmp_path, world, VOCAB_SIZE)
    with pytest.raises(CheckpointError, match=f"vocab_size is {VOCAB_SIZE}; .* 50257"):
        continue_prompt(run_folder, sample(), seed=0, device=CPU)
