"""``launch/quickstart.py`` chooses the precision and the number of steps, and shows the result."""

from __future__ import annotations

import json
import math
import shlex
import sys
import time
from pathlib import Path

import pytest
import torch

from data_tools.shards.manifest import load_manifest
from launch import quickstart
from launch.quickstart import CONFIGS, boxed, choose_precision, choose_settings, fit_steps
from pipeline.config.loading import dump_config, load_config
from pipeline.config.schema import Config
from pipeline.hardware import matmul_ceiling
from pipeline.run_folder.layout import CONFIG_FILE


@pytest.fixture
def config(corpus: Path, tmp_path: Path) -> Config:
    return load_config(CONFIGS, [f"data.path={corpus}", f"run.out_dir={tmp_path / 'run'}", "run.device=cpu"])


def choose(config: Config, given: list[str], monkeypatch: pytest.MonkeyPatch, left_s: float = 60.0) -> dict[str, str]:
    """Return the chosen settings, on a machine where a step takes 0.5 s and each command 5 s in addition."""
    monkeypatch.setattr(quickstart, "measure_step", lambda settings: (0.5, 5.0))
    monkeypatch.setattr(quickstart, "choose_precision", lambda device: "bf16")
    settings = choose_settings(given, config, time.perf_counter() + left_s)
    assert settings[: len(given)] == given
    return dict(setting.split("=", 1) for setting in settings)


def test_the_steps_fill_the_time(
    config: Config, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["batch.tokens_per_step=256", "batch.micro_batch_size=1"]  # the corpus has enough samples of this size
    chosen = choose(load_config(CONFIGS, [*given, f"data.path={config.data.path}"]), given, monkeypatch)
    starts = quickstart.STARTS_AFTER_PROBE * 5.0
    assert int(chosen["schedule.max_steps"]) == pytest.approx((60 - starts) / 0.5, abs=1)
    assert int(chosen["evaluation.every_steps"]) * quickstart.EVALUATIONS >= int(chosen["schedule.max_steps"])
    assert chosen["run.precision"] == "bf16" and "evaluation.sample" not in chosen
    assert "longer than --minutes allows" not in capsys.readouterr().out
    late = choose(
        load_config(CONFIGS, [*given, f"data.path={config.data.path}"]), given, monkeypatch, left_s=starts + 1
    )
    assert late["schedule.max_steps"] == late["evaluation.every_steps"] == str(quickstart.FEWEST_STEPS)
    assert late["evaluation.sample"] == "false"
    assert "longer than --minutes allows: at least 20 steps are trained" in capsys.readouterr().out


def test_at_least_some_steps_and_at_most_one_pass_over_the_data(config: Config) -> None:
    assert fit_steps(config, step_s=0.5, left_s=-3.0) == quickstart.FEWEST_STEPS
    assert config.data.path is not None
    tokens = load_manifest(config.data.path).tokens_of("train")
    small = config.model_copy(update={"batch": config.batch.model_copy(update={"tokens_per_step": tokens // 30})})
    assert fit_steps(small, step_s=1e-6, left_s=60.0) == fit_steps(small, step_s=1e-6, left_s=math.inf) == 30


def test_values_of_the_user_win(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = choose(config, ["schedule.max_steps=7", "run.precision=fp32"], monkeypatch)
    assert chosen == {"schedule.max_steps": "7", "run.precision": "fp32"}


def test_a_begun_run_keeps_its_settings(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Path(config.run.out_dir)
    folder.mkdir()
    begun = load_config(CONFIGS, ["run.precision=fp32", "schedule.max_steps=33", "evaluation.every_steps=9"])
    (folder / CONFIG_FILE).write_text(json.dumps(dump_config(begun)))
    chosen = choose(config, [], monkeypatch)
    assert chosen == {"run.precision": "fp32", "schedule.max_steps": "33", "evaluation.every_steps": "9"}


@pytest.mark.parametrize(("bf16_flops", "expected"), [(1.4e11, "fp32"), (1.6e11, "bf16")])
def test_bf16_must_be_worthwhile(bf16_flops: float, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    speeds = {torch.bfloat16: bf16_flops, torch.float32: 1e11}
    monkeypatch.setattr(matmul_ceiling, "measure_matmul_ceiling", lambda device, dtype: speeds[dtype])
    assert choose_precision("cpu") == expected


@pytest.mark.parametrize(("gpus", "device"), [(0, "cpu"), (1, "cpu"), (2, "auto")])
def test_the_command_for_two_processes_fits_the_machine(
    gpus: int, device: str, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    _, settings = quickstart.other_backend(config).split(" --set ")
    run = load_config(["fsdp", "quickstart"], shlex.split(settings))
    assert (run.run.device, run.data.path) == (device, config.data.path)


def test_commands_of_an_environment_that_is_not_active_come_after_its_activation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "prefix", str(tmp_path / ".venv"))
    monkeypatch.delenv("VIRTUAL_ENV", raising=False)
    assert quickstart.activation_command() is None, "a Python without a virtual environment"
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "activate").touch()
    assert quickstart.activation_command() == "source .venv/bin/activate"
    monkeypatch.setenv("VIRTUAL_ENV", str(tmp_path / ".venv"))
    assert quickstart.activation_command() is None


def test_the_bars_are_as_long_as_the_losses() -> None:
    header, first, last = quickstart.draw_losses({0: 10.0, 40: 2.5})
    assert header.split() == ["step", "validation", "loss"]
    assert first.split() == ["0", "10.00", 60 * "#"] and last.split() == ["40", "2.50", 15 * "#"]
    assert quickstart.draw_losses({}) == []


def test_the_box_keeps_indentation_and_wraps_long_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quickstart, "_prints_lines", lambda: True)
    lines = boxed("def main():\n\treturn 1\n\n" + "x" * 100, "a title").splitlines()
    assert {len(line) for line in lines} == {quickstart.BOX_WIDTH}
    assert lines[0].startswith("┌─ a title ─") and lines[-1].startswith("└─")
    assert lines[1].startswith("│ def main():") and lines[2].startswith("│     return 1")
    assert sum("x" in line for line in lines) == 2


def test_a_terminal_without_unicode_gets_an_ascii_box(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quickstart, "_prints_lines", lambda: False)
    assert boxed("text", "title").isascii()
