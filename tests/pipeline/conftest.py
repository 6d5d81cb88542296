"""Small models, small shards and a world of one, shared by the tests of stages 2 and 3."""

from __future__ import annotations

import resource
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data_tools.shards.manifest import MANIFEST_NAME, Manifest, SourceRecord, TokenizerRecord
from data_tools.shards.writer import ShardWriter
from data_tools.storage.atomic import write_json_durably
from pipeline.config.schema import Config, ModelConfig
from pipeline.distributed.world import World, join_world
from pipeline.model.gpt2 import GPT2, build_model

#: No size divides another, and 89 words leave 39 padding rows of 128.
TINY_MODEL: dict[str, Any] = {"n_layer": 2, "n_head": 3, "n_embd": 21, "context_length": 12, "vocab_size": 89}
VOCAB_SIZE = TINY_MODEL["vocab_size"]
END_OF_TEXT = VOCAB_SIZE - 1


def tiny_model_config(**changes: Any) -> ModelConfig:
    """Return ``TINY_MODEL`` with changes."""
    return ModelConfig.model_validate({**TINY_MODEL, **changes})


def tiny_config(run_folder: Path | str = "unused", **sections: dict[str, Any]) -> Config:
    """Return a run config with ``TINY_MODEL``. The sections override its defaults key by key."""
    defaults: dict[str, dict[str, Any]] = {
        "run": {"out_dir": str(run_folder), "device": "cpu", "precision": "fp32"},
        "model": TINY_MODEL,
        "batch": {"tokens_per_step": 48, "micro_batch_size": 2},
        "optimizer": {"learning_rate": 1e-3},
        "schedule": {"warmup_steps": 1, "max_steps": 10},
    }
    for name, section in sections.items():
        defaults[name] = {**defaults.get(name, {}), **section}
    return Config.model_validate(defaults)


def randomised_model(config: ModelConfig, seed: int = 1) -> GPT2:
    """Return a model with noise on every weight, so that no bias is 0 and no LayerNorm weight is 1."""
    model = build_model(config, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.empty_like(parameter).normal_(0.0, 0.2, generator=generator))
    return model


def random_tokens(*shape: int, vocab_size: int = VOCAB_SIZE, seed: int = 0) -> torch.Tensor:
    """Return ids drawn uniformly from the vocabulary, int64."""
    return torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def assert_same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


def write_shards(
    folder: Path,
    shards: dict[str, Sequence[np.ndarray]],
    utf8_bytes: int = 1000,
    masks: dict[str, Sequence[np.ndarray]] | None = None,
    vocabulary_sha256: str = "0" * 64,
) -> Path:
    """Write token shards by split for a vocabulary of ``VOCAB_SIZE``, and their manifest.

    Args:
        utf8_bytes: recorded in the first shard of each split; the other shards record 0.
    """
    folder.mkdir(parents=True)
    records = []
    for split, arrays in shards.items():
        for i, tokens in enumerate(arrays):
            writer = ShardWriter(folder, f"{split}_{i:05d}.npy", split)
            writer.append(
                tokens.astype(np.uint16),
                documents=int((tokens == END_OF_TEXT).sum()),
                utf8_bytes=0 if i else utf8_bytes,
                scored=masks[split][i] if masks else None,
            )
            records.append(writer.close())
    manifest = Manifest(
        tokenizer=TokenizerRecord("test", VOCAB_SIZE, END_OF_TEXT, vocabulary_sha256),
        source=SourceRecord("test", {}),
        settings={},
        shards=tuple(records),
    )
    write_json_durably(folder / MANIFEST_NAME, manifest.to_json())
    return folder


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Use one thread, because threads wait for each other longer than they compute on tensors this small."""
    torch.set_num_threads(1)


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    """Join a gloo group of this process alone, and restore the environment afterwards."""
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"), ("DS_ACCELERATOR", "cpu")):
        monkeypatch.setenv(name, value)
    with join_world(tiny_config().run) as joined:
        yield joined


@pytest.fixture
def gpu_world(gpu: torch.device, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    """Join an NCCL group of this process alone on the first GPU, and restore the environment afterwards."""
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"), ("DS_ACCELERATOR", gpu.type)):
        monkeypatch.setenv(name, value)
    with join_world(tiny_config(run={"device": gpu.type}).run) as joined:
        yield joined


@contextmanager
def largest_file(size_bytes: int) -> Iterator[None]:
    """Let no file grow beyond this size, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
