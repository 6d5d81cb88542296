"""A run records its settings, and how long it has taken over all its starts."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline.config.schema import Config
from pipeline.run_folder.layout import METRICS_FILE
from pipeline.run_folder.metrics import read_metrics
from pipeline.run_folder.sinks import ServiceSink
from pipeline.run_folder.sinks.sink import Row
from pipeline.training import run_record
from pipeline.training.run_record import RunRecord


class Clock:
    """A clock that the test moves."""

    now = 1000.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(run_record, "time", SimpleNamespace(perf_counter=clock.perf_counter))
    return clock


def open_record(folder: Path, resumed_step: int) -> RunRecord:
    config = Config.model_validate({"run": {"out_dir": str(folder)}, "logging": {"sinks": ["jsonl", "console"]}})
    record = RunRecord(config)
    record.start(resumed_step)
    return record


def log_steps(record: RunRecord, clock: Clock, steps: range, seconds: float) -> None:
    for step in steps:
        clock.now += seconds
        record.write({"step": step, "loss": 1.0})


def elapsed(folder: Path) -> dict[int, float]:
    return {row["step"]: row["elapsed_s"] for row in read_metrics(folder) if "loss" in row}


def test_elapsed_time_continues_with_the_run(tmp_path: Path, clock: Clock) -> None:
    """Ten seconds per step. Steps 4 and 5 are lost in a crash but count; the hours until the next start do not."""
    first = open_record(tmp_path, resumed_step=0)
    log_steps(first, clock, range(1, 6), 10.0)
    first.close(0, "finished", {})
    clock.now += 8 * 3600
    second = open_record(tmp_path, resumed_step=3)
    log_steps(second, clock, range(4, 7), 10.0)
    second.close(0, "finished", {})
    assert elapsed(tmp_path) == {1: 10.0, 2: 20.0, 3: 30.0, 4: 60.0, 5: 70.0, 6: 80.0}


def test_a_run_from_scratch_starts_at_zero(tmp_path: Path, clock: Clock) -> None:
    for _ in range(2):
        record = open_record(tmp_path, resumed_step=0)
        log_steps(record, clock, range(1, 3), 10.0)
        record.close(0, "finished", {})
    assert elapsed(tmp_path) == {1: 10.0, 2: 20.0}


def test_rows_without_elapsed_time_count_as_zero(tmp_path: Path, clock: Clock) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    record = open_record(tmp_path, resumed_step=1)
    log_steps(record, clock, range(2, 3), 10.0)
    record.close(0, "finished", {})
    assert read_metrics(tmp_path)[1]["elapsed_s"] == 10.0


def test_without_tensorboard_there_are_no_event_files(tmp_path: Path) -> None:
    record = open_record(tmp_path, resumed_step=0)
    record.write({"step": 1, "loss": 1.0})
    record.close(0, "finished", {"loss": 1.0})
    assert {path.name for path in tmp_path.iterdir()} == {METRICS_FILE}


class SentRows(ServiceSink):
    """A service that keeps what it receives."""

    def __init__(self) -> None:
        self.received: list[Row] = []

    def start(self, config: dict[str, Any], resumed_step: int) -> None:
        pass

    def write(self, row: Row) -> None:
        self.received.append(row)

    def end(self, summary: Row) -> None:
        self.received.append(summary)


def test_an_error_in_the_report_does_not_hide_how_the_run_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: Any) -> None:
        raise KeyError("loss")

    sink = SentRows()
    monkeypatch.setattr(run_record, "_create_sinks", lambda *_: [sink])
    monkeypatch.setattr(run_record, "write_report", fail)
    record = open_record(tmp_path, resumed_step=0)
    record.close(3, "failed", {})
    assert sink.received[0]["ended"] == sink.received[1]["state"] == "failed"
    assert caplog.messages == ["the sinks get no report: KeyError('loss')"]


def test_every_row_names_the_keys_that_change_the_numbers(tmp_path: Path) -> None:
    backend = {"name": "deepspeed", "deepspeed": {"prescale_gradients": True}, "allow_different_numbers": True}
    run = {"out_dir": str(tmp_path)}
    config = Config.model_validate(
        {"run": run, "backend": backend, "logging": {"sinks": ["jsonl", "tensorboard", "console"]}}
    )
    record = RunRecord(config)
    record.start(0)
    record.write({"step": 1, "loss": 2.0, "mean_loss": 2.0})
    record.close(0, "finished", {})
    assert [row["different_numbers"] for row in read_metrics(tmp_path) if "loss" in row] == [["prescale_gradients"]]


def test_a_resumed_run_logs_a_damaged_line_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The record and the sinks read the file at each start."""
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "elapsed_s": 2.0}\n{"step": 2, "los')
    for _ in range(2):
        open_record(tmp_path, resumed_step=2).close(2, "finished", {})
    assert caplog.text.count("dropping a line that was cut short or damaged") == 1
    assert '"los' not in path.read_text()
