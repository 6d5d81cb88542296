"""TensorBoard shows every logged step once, in grouped charts, with hyperparameters and generated text."""

from __future__ import annotations

import logging
import re
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from tensorboard.summary.writer import event_file_writer

from pipeline.errors import ConfigError
from pipeline.run_folder.layout import TENSORBOARD_FOLDER
from pipeline.run_folder.sinks import check_sinks
from pipeline.run_folder.sinks.tensorboard import TENSORBOARD_TAGS, TensorBoardLog, hyperparameters, tensorboard_tag
from tests.pipeline.conftest import largest_file

GROUPS = {"loss", "perplexity", "optimizer", "speed", "ranks", "steps", "system"}


@pytest.fixture(autouse=True)
def first_files_of_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Event files of one second are read in the order of a number in their names, as text: 10 comes before 9."""
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(0))


def start(folder: Path, resumed_step: int = 0, config: dict[str, Any] | None = None) -> TensorBoardLog:
    tensorboard = TensorBoardLog(folder)
    tensorboard.start(config or {}, resumed_step)
    return tensorboard


def row(step: int) -> dict[str, Any]:
    return {"step": step, "loss": 10.0 - step, "lr": step / 1000}


def log_steps(folder: Path, steps: range, *, resumed_step: int = 0) -> None:
    tensorboard = start(folder, resumed_step)
    for step in steps:
        tensorboard.write(row(step))
    tensorboard.end({})


def events(folder: Path) -> EventAccumulator:
    accumulator = EventAccumulator(str(folder / TENSORBOARD_FOLDER), size_guidance={"scalars": 0})
    accumulator.Reload()
    return accumulator


@pytest.mark.parametrize(
    ("module", "cure"),
    [("torch.utils.tensorboard", "-e "), ("tensorboard.plugins.hparams.metadata", "--force-reinstall ")],
)
def test_a_damaged_installation_is_one_line_at_the_start(
    module: str, cure: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A missing package needs no reinstallation, but a damaged one does."""
    check_sinks(["jsonl", "tensorboard"], "project")
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(
        ConfigError, match=f"logging.sinks: tensorboard cannot be imported .*pip install.* {cure}"
    ) as caught:
        check_sinks(["jsonl", "tensorboard"], "project")
    assert "\n" not in str(caught.value)
    check_sinks(["jsonl"], "project")


def test_tags_are_grouped(tmp_path: Path) -> None:
    everything = {key: float(i) for i, key in enumerate(TENSORBOARD_TAGS)}
    tensorboard = start(tmp_path)
    tensorboard.write({**everything, "step": 1})
    tensorboard.end({})
    drawn = events(tmp_path)
    tags = drawn.Tags()["scalars"]
    assert sorted(tags) == sorted(TENSORBOARD_TAGS.values())
    for key, tag in TENSORBOARD_TAGS.items():
        assert [(s.step, s.value) for s in drawn.Scalars(tag)] == [(1, everything[key])], tag
    assert {tag.split("/")[0] for tag in tags} == GROUPS
    others = [tensorboard_tag(key) for key in ("layer_grad_norm/ln_f", "task_piqa_acc")] + ["results/loss"]
    assert min([*tags, *others]) == "loss/training", "TensorBoard opens at the loss"


def test_the_losses_of_a_mixture_s_data_sets_are_beside_their_mean(tmp_path: Path) -> None:
    tensorboard = start(tmp_path)
    tensorboard.write({"step": 3, "val_loss": 2.0, "val_loss_wiki": 1.0, "val_loss_code.v2": 3.0})
    tensorboard.end({})
    drawn = events(tmp_path)
    tags = ["loss/validation", "loss/validation/wiki", "loss/validation/code.v2"]
    assert {tag: drawn.Scalars(tag)[0].value for tag in tags} == dict(zip(tags, (2.0, 1.0, 3.0), strict=True))


def test_values_are_those_of_the_rows(tmp_path: Path) -> None:
    log_steps(tmp_path, range(1, 6))
    scalars = events(tmp_path).Scalars("loss/training")
    assert [(s.step, s.value) for s in scalars] == [(step, 10.0 - step) for step in range(1, 6)]


def test_missing_figures_are_not_drawn(tmp_path: Path) -> None:
    tensorboard = start(tmp_path)
    tensorboard.write({"step": 1, "val_loss": 2.0, "loss": None})
    tensorboard.end({})
    assert events(tmp_path).Tags()["scalars"] == ["loss/validation"]


@pytest.mark.parametrize(("resumed_step", "expected"), [(4, range(1, 8)), (0, range(5, 8))])
def test_no_step_is_drawn_twice(tmp_path: Path, resumed_step: int, expected: range) -> None:
    """After a resume, and after a fresh start over an old run."""
    log_steps(tmp_path, range(1, 7))
    log_steps(tmp_path, range(5, 8), resumed_step=resumed_step)
    assert [s.step for s in events(tmp_path).Scalars("loss/training")] == list(expected)


def test_hyperparameters_and_results(tmp_path: Path) -> None:
    config = {
        "run": {"name": "x", "compile": False},
        "optimizer": {"betas": [0.9, 0.95]},
        "data": {"seq_len": None},
        "logging": {"every_steps": 7},
    }
    tensorboard = start(tmp_path, config=config)
    tensorboard.write(row(1))
    tensorboard.end({"loss": 3.25, "state": "finished"})
    accumulator = events(tmp_path)
    settings = accumulator.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    for text in (b"run.name", b"optimizer.betas", b"[0.9, 0.95]", b"data.seq_len"):
        assert text in settings
    assert b"logging" not in settings, "the section does not decide the result"
    assert [s.value for s in accumulator.Scalars("results/loss")] == [3.25]


def test_a_resumed_run_shows_its_current_settings_beside_its_current_results(tmp_path: Path) -> None:
    """TensorBoard shows the first settings in a folder, and the last results."""
    for resumed_step, max_steps, loss in ((0, 60, 3.0), (60, 80, 2.0)):
        tensorboard = start(tmp_path, resumed_step, {"schedule": {"max_steps": max_steps}})
        tensorboard.write(row(max_steps))
        tensorboard.end({"loss": loss})
    accumulator = events(tmp_path)
    content = accumulator.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    settings = HParamsPluginData.FromString(content).session_start_info.hparams
    assert settings["4 schedule.max_steps"].number_value == 80
    assert [scalar.value for scalar in accumulator.Scalars("results/loss")] == [2.0]
    assert [scalar.step for scalar in accumulator.Scalars("loss/training")] == [60, 80], "the curves stay"


def test_what_matters_is_first_and_the_backends_are_those_of_all_starts() -> None:
    config = {"run": {"name": "x", "seed": 1}, "optimizer": {"betas": [0.9, 0.95], "learning_rate": 1e-3}}
    ddp, fsdp = ({"backend": name, "world_size": 2, "device": "cpu"} for name in ("DDP", "FSDP2"))
    rows = [{"step": 0, "started": ddp}, row(1), {"step": 1, "started": ddp}, {"step": 1, "started": fsdp}]
    shown = hyperparameters(config, rows)
    names = ["1 backends", "2 optimizer.learning_rate", "optimizer.betas", "run.name", "run.seed"]
    assert sorted(shown) == names, "TensorBoard sorts by name"
    assert shown["1 backends"] == "DDP, 2 x cpu, then FSDP2, 2 x cpu"


def test_training_and_validation_share_a_custom_chart(tmp_path: Path) -> None:
    log_steps(tmp_path, range(1, 3))
    (event,) = events(tmp_path).Tensors("custom_scalars__config__")
    layout = Layout.FromString(event.tensor_proto.string_val[0])
    charts = {chart.title: list(chart.multiline.tag) for category in layout.category for chart in category.chart}
    assert charts["training and validation"] == ["^loss/training$", "^loss/validation$"]
    patterns = [re.compile(pattern) for of_chart in charts.values() for pattern in of_chart]
    assert all(any(pattern.match(tag) for tag in TENSORBOARD_TAGS.values()) for pattern in patterns)


@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_full_disk_loses_only_what_the_writer_had_not_written(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The writer's thread ends with its first error, and a new writer takes over."""
    tensorboard = start(tmp_path)
    steps = iter(range(1, 10_000))
    with caplog.at_level(logging.WARNING), largest_file(1000):
        until = time.monotonic() + 30
        while "cannot write TensorBoard events" not in caplog.text and time.monotonic() < until:
            tensorboard.write({"step": next(steps), "loss": 1.0})
        assert "cannot write TensorBoard events (File too large)" in caplog.text
    last = next(steps)
    tensorboard.write(row(last))
    tensorboard.end({})
    assert [s.step for s in events(tmp_path).Scalars("loss/training")][-1] == last


def test_a_rewind_hides_later_steps(tmp_path: Path) -> None:
    tensorboard = start(tmp_path)
    for step in (1, 2, 3, 4):
        tensorboard.write(row(step))
    tensorboard.rewind(2)
    tensorboard.write({**row(3), "loss": 0.5})
    tensorboard.end({})
    assert [(s.step, s.value) for s in events(tmp_path).Scalars("loss/training")] == [(1, 9.0), (2, 8.0), (3, 0.5)]


@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_rewind_while_the_disk_is_full_does_not_stop_the_training(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tensorboard = start(tmp_path)
    for step in (1, 2, 3):
        tensorboard.write(row(step))
    with caplog.at_level(logging.WARNING), largest_file(0):
        tensorboard.rewind(1)
        tensorboard.write(row(2))
    assert "cannot write TensorBoard events (File too large)" in caplog.text
    tensorboard.write({**row(3), "loss": 0.5})
    tensorboard.end({})
    assert [s.value for s in events(tmp_path).Scalars("loss/training") if s.step >= 2] == [0.5], "step 3 is hidden"
