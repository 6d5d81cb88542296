"""A run is compiled if the config asks for it or if it saves time, but never without a compiler."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pipeline.distributed.world import World
from pipeline.training import run
from pipeline.training.run import SHORTEST_COMPILED_CPU_RUN_S, choose_compilation
from tests.pipeline.conftest import tiny_config

LONG_S, SHORT_S = SHORTEST_COMPILED_CPU_RUN_S + 1, SHORTEST_COMPILED_CPU_RUN_S - 1


@pytest.mark.parametrize(
    ("wanted", "device", "ideal_s", "works", "compiled"),
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
    monkeypatch: pytest.MonkeyPatch, wanted: Any, device: str, ideal_s: float, works: bool, compiled: bool
) -> None:
    monkeypatch.setattr(run, "compiler_works", lambda device: works)
    config = tiny_config(run={"compile": wanted})
    chosen = choose_compilation(config, World(0, 1, 0, torch.device(device)), ideal_s)
    assert chosen.run.compile is compiled
    assert chosen.model_copy(update={"run": config.run}) == config, "nothing else changes"


def test_one_rank_without_a_compiler_turns_it_off(monkeypatch: pytest.MonkeyPatch) -> None:
    class TwoRanks(World):
        def gather(self, item: Any) -> list[Any]:
            return [item, False]

    monkeypatch.setattr(run, "compiler_works", lambda device: True)
    config = tiny_config(run={"compile": True})
    assert choose_compilation(config, TwoRanks(0, 2, 0, torch.device("cpu")), LONG_S).run.compile is False
