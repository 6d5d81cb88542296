"""A small trained backend in one process, its checkpoints, and functions that craft malformed ones."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipeline.backends import Backend
from pipeline.backends.ddp import DdpBackend
from pipeline.checkpoint.loading import load_training_state, load_weights
from pipeline.checkpoint.manifest import read_manifest
from pipeline.checkpoint.pieces import index_pieces
from pipeline.checkpoint.state import TrainingState
from pipeline.checkpoint.verification import find_damage
from pipeline.config.loading import dump_config
from pipeline.distributed.world import World, join_world
from pipeline.errors import CheckpointError
from pipeline.model.gpt2 import build_model
from tests.pipeline.conftest import assert_same, random_tokens, tiny_config
from tests.support.checkpoints import save_checkpoint

MANIFEST, STATE = "manifest.json", "state.json"
WEIGHTS, MOMENTS = "rank_00000_weights.safetensors", "rank_00000_moments.safetensors"
FILES = [MANIFEST, MOMENTS, WEIGHTS, STATE]

POSITIONS = "wpe.weight"

Save = Callable[..., Path]


def make_backend(world: World, seed: int, **sections: dict[str, Any]) -> DdpBackend:
    config = tiny_config(**sections)
    return DdpBackend(build_model(config.model, seed), config, world)


def train_steps(backend: Backend, steps: int, first_seed: int = 0, ema_decay: float | None = None) -> None:
    for seed in range(first_seed, first_seed + steps):
        tokens = random_tokens(2, 9, seed=seed).to(backend.model.wte.weight.device)
        backend.accumulate(tokens[:, :-1], tokens[:, 1:], 1 / 16, is_last=True)
        backend.step(1e-2, ema_decay)


def updates_of(backend: Backend) -> int:
    """Return AdamW's step count, which is the same for all parameters."""
    counts = {float(state["step"]) for state in backend.state.adam_states()}
    assert len(counts) == 1
    return int(counts.pop())


def state_of(backend: DdpBackend, step: int) -> TrainingState:
    return TrainingState(step, step * 4, step * 48, updates_of(backend), *backend.loss_scaler.state, seed=1337)


def contents(backend: Backend) -> dict[str, Tensor]:
    """Return copies of the weights and moments by name, in host memory."""
    return {
        f"{fragment.name} {kind}": tensor.cpu().clone()
        for fragment in backend.fragments()
        for kind, tensor in fragment.tensors.items()
    }


@contextmanager
def unchanged(backend: DdpBackend) -> Iterator[None]:
    """Assert that the block leaves the training state unchanged."""
    before, updates, scaler = contents(backend), updates_of(backend), vars(backend.loss_scaler).copy()
    yield
    assert_same(contents(backend), before)
    assert (updates_of(backend), vars(backend.loss_scaler)) == (updates, scaler)


@pytest.fixture
def backend(world: World) -> DdpBackend:
    """Return a backend after three training steps."""
    trained = make_backend(world, seed=1)
    train_steps(trained, 3)
    return trained


@pytest.fixture
def save(tmp_path: Path, world: World, backend: DdpBackend) -> Save:
    def save_step(step: int = 3, keep_last: int = 10, of: DdpBackend = backend) -> Path:
        return save_checkpoint(tmp_path, state_of(of, step), dump_config(tiny_config()), of, world, keep_last)

    return save_step


def stored_tensors(folder: Path) -> dict[str, Tensor]:
    """Return the whole tensors of a checkpoint by kind and name."""
    manifest = read_manifest(folder)
    tensors = {}
    for kind, by_name in index_pieces(folder, manifest).items():
        for name, pieces in by_name.items():
            elements = []
            for piece in pieces:
                with safe_open(piece.file, framework="pt") as file:
                    elements.append(file.get_tensor(piece.key).reshape(-1))
            tensors[f"{kind} {name}"] = torch.cat(elements).view(manifest.parameters[name])
    return tensors


def edit_manifest(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the manifest and give it its correct hash."""
    manifest = json.loads((folder / MANIFEST).read_text())
    del manifest["sha256"]
    change(manifest)
    manifest["sha256"] = hashlib.sha256(json.dumps(manifest).encode()).hexdigest()
    (folder / MANIFEST).write_text(json.dumps(manifest))


def seal(folder: Path) -> None:
    """Write the hashes of all files as they are now into the manifest."""

    def name_all(manifest: dict[str, Any]) -> None:
        manifest["files"] = {
            path.name: {"bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
            for path in sorted(folder.iterdir())
            if path.name != MANIFEST
        }

    edit_manifest(folder, name_all)


def edit_tensors(folder: Path, file: str, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Change the tensors of one file, and update the manifest."""
    tensors = load_file(folder / file)
    change(tensors)
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / file)
    seal(folder)


def edit_state(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change ``state.json``, and update the manifest."""
    state = json.loads((folder / STATE).read_text())
    change(state)
    (folder / STATE).write_text(json.dumps(state))
    seal(folder)


@pytest.fixture(scope="module")
def untouched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a checkpoint to copy, so that each test saves the time of training and saving."""
    run_folder = tmp_path_factory.mktemp("run")
    config = tiny_config()
    with pytest.MonkeyPatch.context() as environment:
        for name, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"), ("DS_ACCELERATOR", "cpu")):
            environment.setenv(name, value)
        with join_world(config.run) as world:
            trained = make_backend(world, seed=1)
            train_steps(trained, 1)
            return save_checkpoint(run_folder, state_of(trained, 3), dump_config(config), trained, world, 1)


@pytest.fixture
def folder(untouched: Path, tmp_path: Path) -> Path:
    """Return a checkpoint to change."""
    return Path(shutil.copytree(untouched, tmp_path / "checkpoints" / untouched.name))


def assert_rejected(folder: Path, world: World, place: Path, message: str, *, weights_too: bool = True) -> None:
    """Assert that verifying and loading fail with one line that names ``place``, and that loading changes nothing."""
    found = find_damage(folder)
    assert found is not None
    target = make_backend(world, seed=2)
    with unchanged(target):
        with pytest.raises(CheckpointError) as loading:
            load_training_state(folder, target)
        lines = [found, str(loading.value)]
        if weights_too:
            with pytest.raises(CheckpointError) as loading:
                load_weights(folder, {name: p.detach() for name, p in target.model.named_parameters()})
            lines.append(str(loading.value))
    for line in lines:
        assert line.startswith(f"{place}: ") and re.search(message, line) and "\n" not in line, line
