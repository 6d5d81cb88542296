"""A run is compiled if the config asks for it or if it saves time, but never without a compiler."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.backends.ddp import DdpBackend
from pipeline.checkpoint.state import TrainingState
from pipeline.config.loading import dump_config
from pipeline.config.schema import Config
from pipeline.data.batch_plan import plan_batch
from pipeline.distributed.world import World
from pipeline.model.gpt2 import build_model, parameter_count
from pipeline.training import compilation
from pipeline.training.compilation import SHORTEST_COMPILED_CPU_RUN_S, choose_compilation, measure_micro_step
from pipeline.training.start import Start
from tests.pipeline.conftest import tiny_config
from tests.support.checkpoints import save_checkpoint

LONG_S, SHORT_S = SHORTEST_COMPILED_CPU_RUN_S + 1, SHORTEST_COMPILED_CPU_RUN_S - 1


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return tiny_config(tmp_path, run={"compile": "auto"})


def with_compile(config: Config, wanted: Any) -> Config:
    return config.with_run(compile=wanted)


def choose(config: Config, world: World, start: Start | None = None) -> Config:
    return choose_compilation(config, world, plan_batch(config, 1), start)


def pretend(monkeypatch: pytest.MonkeyPatch, config: Config, run_s: float, *, works: bool = True) -> None:
    """Pretend that the whole run takes ``run_s`` seconds, and that a compiler works or does not."""
    micro_steps = plan_batch(config, 1).accumulation * config.schedule.max_steps
    monkeypatch.setattr(compilation, "measure_micro_step", lambda *_: run_s / micro_steps)
    monkeypatch.setattr(compilation, "compiler_works", lambda device: works)


@pytest.mark.parametrize(
    ("wanted", "device", "run_s", "works", "compiled"),
    [
        ("auto", "cpu", LONG_S, True, True),
        ("auto", "cpu", SHORT_S, True, False),
        ("auto", "cpu", LONG_S, False, False),
        ("auto", "cuda", SHORT_S, True, True),
        ("auto", "mps", LONG_S, True, False),
        (True, "cpu", SHORT_S, True, True),
        (True, "cpu", SHORT_S, False, False),
        (False, "cuda", LONG_S, True, False),
    ],
)
def test_choice(
    monkeypatch: pytest.MonkeyPatch,
    config: Config,
    wanted: Any,
    device: str,
    run_s: float,
    works: bool,
    compiled: bool,
) -> None:
    config = with_compile(config, wanted)
    pretend(monkeypatch, config, run_s, works=works)
    chosen = choose(config, World(0, 1, 0, torch.device(device)))
    assert chosen.run.compile is compiled
    assert with_compile(chosen, wanted) == config, "nothing else changes"


def test_a_short_run_is_measured_only_once(monkeypatch: pytest.MonkeyPatch, config: Config, world: World) -> None:
    micro_steps = plan_batch(config, 1).accumulation * config.schedule.max_steps
    for cold_s, warm_s, compiled, measurements in ((SHORT_S, 0.0, False, 1), (LONG_S, SHORT_S, False, 2)):
        found = iter((cold_s / micro_steps, warm_s / micro_steps))
        monkeypatch.setattr(compilation, "measure_micro_step", lambda *_, found=found: next(found))
        assert choose(config, world).run.compile is compiled
        assert len(list(found)) == 2 - measurements


def test_one_rank_without_a_compiler_turns_it_off(monkeypatch: pytest.MonkeyPatch, config: Config) -> None:
    class TwoRanks(World):
        def gather(self, item: Any) -> list[Any]:
            return [item, False]

    pretend(monkeypatch, config, LONG_S)
    assert choose(with_compile(config, True), TwoRanks(0, 2, 0, torch.device("cpu"))).run.compile is False


def test_the_slowest_rank_decides(monkeypatch: pytest.MonkeyPatch, config: Config) -> None:
    class WithASlowRank(World):
        def gather(self, item: Any) -> list[Any]:
            return [item, item if isinstance(item, bool) else 100 * item]

    pretend(monkeypatch, config, SHORT_S)
    assert choose(config, WithASlowRank(0, 2, 0, torch.device("cpu"))).run.compile is True


def save(config: Config, world: World, step: int, compiled: bool | str) -> Start:
    """Save a checkpoint that has this value of ``run.compile``."""
    stored = dump_config(with_compile(config, compiled))
    state = TrainingState(step, 4, 48, 1, 1.0, 0, config.run.seed, None)
    backend = DdpBackend(build_model(config.model, 1), config, world)
    return Start.read(save_checkpoint(Path(config.run.out_dir), state, stored, backend, world, 9))


@pytest.mark.parametrize("before", [True, False])
def test_a_run_that_continues_keeps_its_choice(
    monkeypatch: pytest.MonkeyPatch, config: Config, world: World, before: bool
) -> None:
    start = save(config, world, 1, before)
    pretend(monkeypatch, config, SHORT_S if before else LONG_S)
    assert choose(config, world, start).run.compile is before


def test_only_the_steps_that_are_left_count(monkeypatch: pytest.MonkeyPatch, config: Config, world: World) -> None:
    """A checkpoint of another program does not say whether it was compiled, and may be near the end."""
    start = save(config, world, config.schedule.max_steps - 1, "auto")
    pretend(monkeypatch, config, LONG_S)
    assert choose(config, world).run.compile is True
    assert choose(config, world, start).run.compile is False


@pytest.mark.parametrize("precision", ["fp32", "amp_bf16", "bf16"])
def test_the_measurement_leaves_no_trace(config: Config, precision: str) -> None:
    config = config.with_run(precision=precision)
    state = torch.get_rng_state()
    for passes in (1, 2):
        assert measure_micro_step(config, plan_batch(config, 1), 16, passes) > 0
    assert torch.equal(torch.get_rng_state(), state)


def test_the_measured_model_runs_every_block_with_the_memory_of_one(config: Config) -> None:
    config = config.model_copy(update={"model": config.model.model_copy(update={"n_layer": 5})})
    model = compilation._timed_model(config)
    calls = []
    for layer, block in enumerate(model.h):
        block.register_forward_hook(lambda *_, layer=layer: calls.append(layer))
    tokens = torch.zeros(2, 8, dtype=torch.int64)
    model(tokens, tokens).backward()
    assert calls == [0, 1, 2, 3, 4]
    one_block = config.model.model_copy(update={"n_layer": 1})
    assert sum(parameter.numel() for parameter in model.parameters()) == parameter_count(one_block, padded=True)
    assert all(parameter.grad is not None for parameter in model.parameters())
