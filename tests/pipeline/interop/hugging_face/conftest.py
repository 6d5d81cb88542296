"""A checkpoint of a small model with GPT-2's vocabulary, stored in pieces, and its export."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from data_tools.shards.manifest import TokenizerRecord
from pipeline.checkpoint.layout import GROUPS, group_of, list_checkpoints
from pipeline.checkpoint.manifest import read_manifest
from pipeline.checkpoint.pieces import piece_key
from pipeline.checkpoint.saving import Snapshot, write_checkpoint
from pipeline.checkpoint.state import TrainingState
from pipeline.checkpoint.tensor_stream import TensorGroups, in_memory
from pipeline.config.loading import dump_config
from pipeline.config.schema import Config
from pipeline.distributed.world import World
from pipeline.interop.hugging_face.exporting import export_checkpoint
from pipeline.model.gpt2 import GPT2
from pipeline.model.parameter_state import ADAMW_STATE, WEIGHT, state_names_of
from tests.pipeline.conftest import randomised_model, tiny_config

STEP = 7
CONTEXT = 256


def text_config(run_folder: Path | str = "unused", **model: Any) -> Config:
    """Return the config of a small model with GPT-2's vocabulary and a context for a text of 200 tokens."""
    sizes = {"n_layer": 2, "n_head": 3, "n_embd": 24, "context_length": CONTEXT, "vocab_size": 50257}
    return tiny_config(run_folder, run={"name": 'a "quoted" name'}, model={**sizes, **model}, data={"seq_len": 12})


def random_text_model(config: Config) -> GPT2:
    """Return a model with random weights everywhere except padding rows of zeros."""
    model = randomised_model(config.model).eval()
    with torch.no_grad():
        model.wte.weight[config.model.vocab_size :] = 0
    return model


def save_in_pieces(model: GPT2, config: Config, run_folder: Path, tokenizer: TokenizerRecord | None = None) -> Path:
    """Save a checkpoint whose parameters are split in two pieces within a row."""
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    shapes = {name: list(weight.shape) for name, weight in weights.items()}
    state_names = state_names_of(shapes, config)
    groups: TensorGroups = {group: {} for group in GROUPS}
    for kind in (WEIGHT, *ADAMW_STATE):
        for name, weight in weights.items():
            flat = weight.reshape(-1) if kind == WEIGHT else torch.zeros(weight.numel())
            middle = flat.numel() // 2 + 1
            for low, high in ((0, middle), (middle, flat.numel())):
                groups[group_of(kind)][piece_key(kind, name, (low, high))] = in_memory(flat[low:high])
    state = TrainingState(STEP, 28, 336, STEP, None, 0, 1337, tokenizer=tokenizer)
    alone = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"))
    snapshot = Snapshot(state, shapes, state_names, groups)
    write_checkpoint(run_folder, snapshot, dump_config(config), alone, keep_last=1)
    return run_folder


@pytest.fixture(scope="session")
def text_model() -> GPT2:
    """Return the model of ``run_folder``. Tests must not change it."""
    return random_text_model(text_config())


@pytest.fixture(scope="session")
def run_folder(text_model: GPT2, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run with a checkpoint of ``text_model``, metrics and results. Tests must not change it."""
    folder = tmp_path_factory.mktemp("hugging_face") / "run"
    save_in_pieces(text_model, text_config(folder), folder)
    rows = [{"step": step, "loss": 11.0 - step} for step in range(1, STEP + 2)]
    rows += [{"step": 0, "val_loss": 10.9}, {"step": STEP, "val_loss": 4.321}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "evaluation").mkdir()
    own = read_manifest(list_checkpoints(folder)[-1]).weights_sha256()
    for name, sha256, figure in (("validation", own, 1.2345), ("other", "", 9.8765)):
        result = {"step": STEP, "weights_sha256": sha256, "bits_per_byte": figure}
        (folder / "evaluation" / f"{name}.json").write_text(json.dumps(result))
    return folder


@pytest.fixture(scope="session")
def exported(run_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the run as a Hugging Face folder. Tests must not change it."""
    return export_checkpoint(run_folder, tmp_path_factory.mktemp("exported") / "model", "float32").path


@pytest.fixture(scope="session")
def theirs(exported: Path) -> Any:
    """Return the export as loaded by ``transformers``."""
    transformers = pytest.importorskip("transformers")
    return transformers.GPT2LMHeadModel.from_pretrained(exported).eval()
