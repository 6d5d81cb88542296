"""The speedrun measures runs to their last step, keeps finished runs, and compares contenders."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import speedrun
from benchmarks.speedrun import CONTENDERS, TARGET_LOSS, Case, Result, run_cases
from pipeline.config.schema import Config
from tests.support.runs import Sections

ADAMW, _, MUON = CONTENDERS

#: A run that takes seconds, whatever the contender is.
TINY: Sections = {
    "run": {"compile": False},
    "model": {"preset": "gpt2-tiny", "n_layer": 1, "n_head": 2, "n_embd": 32, "context_length": 32},
    "batch": {"tokens_per_step": 64, "micro_batch_size": 2},
    "schedule": {"warmup_steps": 1, "max_steps": 3, "decay_steps": 1},
    "evaluation": {"every_steps": 1000, "max_batches": 2},
}


def result_of(case: Case, val_loss: float, train_s: float) -> Result:
    settings = case.sections(Path("data"), {})
    steps = settings["schedule"]["max_steps"]
    tokens = steps * settings["batch"]["tokens_per_step"]
    return Result(case, settings, steps, tokens, val_loss, train_s, train_s + 10)


def test_a_run_is_measured_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case("ddp", 1, MUON, 1)
    (tmp_path / case.name / "checkpoints").mkdir(parents=True)  # what an interrupted run leaves
    [result] = run_cases([case], tmp_path, TINY)
    assert (result.steps, result.tokens) == (3, 192)
    assert 5 < result.val_loss < 12
    assert 0 < result.train_s < result.command_s
    assert f"| ddp x1 | {MUON} | 1 | {result.val_loss:.4f} |" in (tmp_path / "page.md").read_text()

    ran: list[Case] = []

    def run_case(case: Case, settings: Sections, folder: Path) -> Result:
        ran.append(case)
        return replace(result, case=case, settings=settings)

    monkeypatch.setattr(speedrun, "run_case", run_case)
    other = replace(case, seed=2)
    first, second = run_cases([case, other], tmp_path, TINY)
    assert (first, second.case) == (result, other)
    assert set(ran) == {other}
    assert [row["case"]["seed"] for row in json.loads((tmp_path / "results.json").read_text())] == [1, 2]

    ran.clear()
    run_cases([case], tmp_path, {**TINY, "schedule": {**TINY["schedule"], "max_steps": 4}})
    assert set(ran) == {case}, "a run whose settings have changed runs again"


def test_the_page_compares_with_the_first_contender_of_the_same_backend() -> None:
    results = [
        result_of(Case(backend, processes, contender, seed), TARGET_LOSS + loss, seconds)
        for backend, processes, contender, seed, loss, seconds in (
            ("ddp", 1, ADAMW, 1, 0.0, 100),
            ("ddp", 1, ADAMW, 2, -0.1, 104),
            ("ddp", 1, MUON, 1, 0.1, 51),
            ("ddp", 1, MUON, 2, 0.0, 51),
            ("fsdp", 2, ADAMW, 1, 0.0, 200),
        )
    ]
    page = speedrun.render(results)
    adamw, muon, fsdp = [line for line in page.splitlines() if " seeds | " in line]
    assert f"{TARGET_LOSS - 0.05:.4f} ± 0.0707 | 2 of 2 seeds | 102.0 ± 2.8 | 1.00" in adamw
    assert "1 of 2 seeds | 51.0 ± 0.0 | 0.50 |" in muon
    assert "200.0 ± 0.0 | 1.00" in fsdp


@pytest.mark.parametrize("contender", CONTENDERS)
def test_contenders_differ_only_in_optimizer_and_schedule(contender: str) -> None:
    config, first = (
        Config.model_validate(Case("ddp", 1, name, 1).sections(Path("data"), {})) for name in (contender, ADAMW)
    )
    changed = {key for key, value in config.model_dump().items() if value != first.model_dump()[key]}
    assert changed <= {"optimizer", "schedule"}
