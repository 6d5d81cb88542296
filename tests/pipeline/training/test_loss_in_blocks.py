"""A compiled run on a CPU keeps blocks of logits if this is faster, and a run that continues keeps its choice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.backends import create_backend
from pipeline.backends.ddp import DdpBackend
from pipeline.checkpoint.state import TrainingState
from pipeline.config.loading import dump_config
from pipeline.config.schema import Config
from pipeline.data.batch_plan import plan_batch
from pipeline.distributed.world import World
from pipeline.model.blocked_loss import measure_kept_blocks
from pipeline.model.gpt2 import allocate_model, build_model
from pipeline.training import loss_in_blocks
from pipeline.training.loss_in_blocks import choose_loss_in_blocks
from pipeline.training.start import Start
from tests.pipeline.conftest import tiny_config
from tests.support.checkpoints import save_checkpoint

FASTER, SLOWER = (1.0, 0.8), (1.0, 0.9)  # seconds of the whole vocabulary and in blocks


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    monkeypatch.setattr(loss_in_blocks, "LEAST_LOGITS", 1)
    return tiny_config(tmp_path, run={"compile": True})


def choose(config: Config, world: World, start: Start | None = None) -> Config:
    return choose_loss_in_blocks(config, world, plan_batch(config, 1), start)


@pytest.mark.parametrize(
    ("wanted", "device", "compiled", "seconds", "choice"),
    [
        ("auto", "cpu", True, FASTER, "kept"),
        ("auto", "cpu", True, SLOWER, False),
        ("auto", "cpu", False, FASTER, False),
        ("auto", "cuda", True, FASTER, False),
        (True, "cpu", True, FASTER, True),
        (False, "cpu", True, FASTER, False),
        ("kept", "cuda", False, SLOWER, "kept"),
    ],
)
def test_choice(
    monkeypatch: pytest.MonkeyPatch,
    config: Config,
    wanted: Any,
    device: str,
    compiled: bool,
    seconds: tuple[float, float],
    choice: Any,
) -> None:
    config = config.with_run(loss_in_blocks=wanted, compile=compiled)
    monkeypatch.setattr(loss_in_blocks, "measure_kept_blocks", lambda *_: seconds)
    chosen = choose(config, World(0, 1, 0, torch.device(device)))
    assert chosen.run.loss_in_blocks == choice
    assert chosen.with_run(loss_in_blocks=wanted) == config, "nothing else changes"


def test_few_logits_are_not_measured(monkeypatch: pytest.MonkeyPatch, config: Config, world: World) -> None:
    monkeypatch.setattr(loss_in_blocks, "measure_kept_blocks", lambda *_: FASTER)
    plan = plan_batch(config, 1)
    logits = plan.micro_batch_size * plan.seq_len * 128  # the vocabulary with padding
    for least, choice in ((logits, "kept"), (logits + 1, False)):
        monkeypatch.setattr(loss_in_blocks, "LEAST_LOGITS", least)
        assert choose(config, world).run.loss_in_blocks == choice


def test_ranks_choose_together(monkeypatch: pytest.MonkeyPatch, config: Config) -> None:
    class WithASlowRank(World):
        def gather(self, item: Any) -> list[Any]:
            return [item, (2.0, 2.0)]

    monkeypatch.setattr(loss_in_blocks, "measure_kept_blocks", lambda *_: FASTER)
    assert choose(config, WithASlowRank(0, 2, 0, torch.device("cpu"))).run.loss_in_blocks is False


@pytest.mark.parametrize(
    ("before", "device", "seconds", "choice"),
    [
        ("kept", "cpu", SLOWER, "kept"),
        (False, "cpu", FASTER, False),
        (True, "cpu", FASTER, "kept"),
        ("kept", "cuda", FASTER, False),
    ],
)
def test_a_run_that_continues_keeps_its_choice(
    monkeypatch: pytest.MonkeyPatch,
    config: Config,
    world: World,
    before: Any,
    device: str,
    seconds: tuple[float, float],
    choice: Any,
) -> None:
    """Memory that the user no longer wants to save, and another device, lead to a new choice."""
    stored = dump_config(config.with_run(loss_in_blocks=before, compile=False))
    state = TrainingState(1, 4, 48, 1, 1.0, 0, config.run.seed, None)
    backend = DdpBackend(build_model(config.model, 1), config.with_run(compile=False), world)
    start = Start.read(save_checkpoint(Path(config.run.out_dir), state, stored, backend, world, 9))
    monkeypatch.setattr(loss_in_blocks, "measure_kept_blocks", lambda *_: seconds)
    assert choose(config, World(0, 1, 0, torch.device(device)), start).run.loss_in_blocks == choice


@pytest.mark.parametrize(("value", "way"), [("auto", False), ("kept", "kept"), (True, True)])
def test_a_backend_computes_the_loss_as_the_config_says(config: Config, world: World, value: Any, way: Any) -> None:
    config = config.with_run(loss_in_blocks=value, compile=False)
    model = allocate_model(config.model, "meta")
    create_backend(model, config, world, plan_batch(config, 1))
    assert model.lm_head.loss_in_blocks == way


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_measurement(dtype: torch.dtype) -> None:
    assert min(measure_kept_blocks(16, 32, 128, dtype)) > 0
