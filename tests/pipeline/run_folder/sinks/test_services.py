"""A service that fails, hangs or is missing never stops a run; rows are sent once it is back."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import ConfigError
from pipeline.run_folder.metrics import read_metrics
from pipeline.run_folder.sinks import check_sinks, service
from pipeline.run_folder.sinks.jsonl import MetricsFile
from pipeline.run_folder.sinks.service import Service, ServiceSink
from pipeline.run_folder.sinks.sink import Row, Sink


class Ledger(Service):
    """A service in memory, which keeps the rows of each of its runs, and fails while ``is_down``."""

    name = "ledger"

    def __init__(self) -> None:
        self.runs: dict[str, list[Row]] = {}
        self.ends: list[Row] = []
        self.is_down = False
        self.current = ""
        self.is_answering = threading.Event()
        self.is_answering.set()

    def connect(self, config: dict[str, Any], run_id: str | None) -> str:
        self._answer()
        self.current = run_id or f"run{len(self.runs)}"
        self.runs.setdefault(self.current, [])
        return self.current

    def send(self, rows: Sequence[Row]) -> None:
        self._answer()
        self.runs[self.current] += rows

    def attach(self, files: Sequence[Path]) -> None:
        self._answer()

    def end(self, summary: Row) -> None:
        self._answer()
        self.ends.append(summary)

    def _answer(self) -> None:
        self.is_answering.wait()
        if self.is_down:
            raise RuntimeError("the server is\ndown")


def start(folder: Path, ledger: Ledger, resumed_step: int = 0, *, waits: bool = True) -> list[Sink]:
    sinks = [MetricsFile(folder), ServiceSink(ledger, folder, waits=waits)]
    for sink in sinks:
        sink.start({}, resumed_step)
    return sinks


def write(sinks: list[Sink], *steps: int, **more: Any) -> None:
    for step in steps:
        for sink in sinks:
            sink.write({"step": step, **more})


def settle(sinks: list[Sink], step: int) -> None:
    for sink in sinks:
        sink.settle(step)


def end(sinks: list[Sink]) -> None:
    for sink in sinks:
        sink.end({"state": "finished"})


def crash(sinks: list[Sink]) -> None:
    """Let the thread send what is queued, and leave the rest."""
    end(sinks[1:])


def steps_of(rows: Sequence[Row]) -> list[int]:
    return [row["step"] for row in rows]


class TestWaiting:
    def test_a_row_is_sent_when_it_is_final(self, tmp_path: Path) -> None:
        ledger = Ledger()
        sinks = start(tmp_path, ledger)
        write(sinks, 1, 2, 3)
        settle(sinks, 2)
        crash(sinks)
        assert steps_of(ledger.runs["run0"]) == [1, 2]

    def test_a_crash_and_a_resume_continue_the_same_run(self, tmp_path: Path) -> None:
        ledger = Ledger()
        sinks = start(tmp_path, ledger)
        write(sinks, 1, 2, 3, 4, 5)
        settle(sinks, 4)
        write(sinks, 4, save_s=1.0)  # a row about the save of step 4 comes after later rows
        crash(sinks)
        sinks = start(tmp_path, ledger, resumed_step=4)
        write(sinks, 5, 6)
        settle(sinks, 6)
        end(sinks)
        assert ledger.runs == {"run0": read_metrics(tmp_path)}
        assert steps_of(ledger.runs["run0"]) == [1, 2, 3, 4, 4, 5, 6]

    def test_a_rollback_sends_no_row_twice(self, tmp_path: Path) -> None:
        ledger = Ledger()
        sinks = start(tmp_path, ledger)
        write(sinks, 1, 2, 3, 4)
        settle(sinks, 2)
        for sink in sinks:
            sink.rewind(2)
        write(sinks, 2, 3, 4, again=1)
        settle(sinks, 4)
        end(sinks)
        assert ledger.runs == {"run0": read_metrics(tmp_path)}

    def test_a_run_from_scratch_is_a_new_run_of_the_service(self, tmp_path: Path) -> None:
        ledger = Ledger()
        for _ in range(2):
            sinks = start(tmp_path, ledger)
            write(sinks, 1)
            settle(sinks, 1)
            end(sinks)
        assert steps_of(ledger.runs["run0"]) == steps_of(ledger.runs["run1"]) == [1]

    def test_a_resume_before_sent_rows_is_a_new_run_with_all_rows(self, tmp_path: Path) -> None:
        ledger = Ledger()
        sinks = start(tmp_path, ledger)
        write(sinks, 1, 2, 3, 4)
        settle(sinks, 4)
        end(sinks)
        sinks = start(tmp_path, ledger, resumed_step=2)
        write(sinks, 3, again=1)
        settle(sinks, 3)
        end(sinks)
        assert ledger.runs["run1"] == read_metrics(tmp_path)
        assert steps_of(ledger.runs["run1"]) == [1, 2, 3]


class TestAtOnce:
    def test_rows_are_sent_at_once_and_a_rollback_starts_a_new_run(self, tmp_path: Path) -> None:
        ledger = Ledger()
        sinks = start(tmp_path, ledger, waits=False)
        write(sinks, 1, 2, 3)
        deadline = time.monotonic() + 60
        while steps_of(ledger.runs.get("run0", [])) != [1, 2, 3]:
            assert time.monotonic() < deadline, "rows are not sent"
            time.sleep(0.01)
        for sink in sinks:
            sink.rewind(1)
        write(sinks, 2, again=1)
        end(sinks)
        assert steps_of(ledger.runs["run0"]) == [1, 2, 3]
        assert ledger.runs["run1"] == read_metrics(tmp_path)
        assert ledger.ends == [{"state": "superseded"}, {"state": "finished"}]


class TestFailures:
    def test_the_first_failure_is_logged_and_rows_are_sent_later(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        ledger = Ledger()
        ledger.is_down = True
        sinks = start(tmp_path, ledger)
        write(sinks, 1, 2)
        settle(sinks, 1)
        settle(sinks, 2)
        crash(sinks)
        assert caplog.text.count("ledger: cannot send (the server is down); the run continues") == 1
        assert "rows that were not sent: 2" in caplog.text and "failures: " in caplog.text
        ledger.is_down = False
        sinks = start(tmp_path, ledger, resumed_step=2)
        write(sinks, 3)
        settle(sinks, 3)
        end(sinks)
        assert ledger.runs == {"run0": read_metrics(tmp_path)}

    def test_a_service_that_hangs_does_not_block_the_run(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(service, "LONGEST_END_S", 0.05)
        ledger = Ledger()
        ledger.is_answering.clear()
        sinks = start(tmp_path, ledger)
        write(sinks, 1)
        settle(sinks, 1)
        end(sinks)
        assert "ledger: the service did not answer within" in caplog.text
        assert "failures: 1; rows that were not sent: 1" in caplog.text
        ledger.is_answering.set()

    def test_the_sink_knows_whether_the_service_has_everything(self, tmp_path: Path) -> None:
        ledger = Ledger()
        assert not ServiceSink(ledger, tmp_path, waits=True).is_complete
        sinks = start(tmp_path, ledger)
        write(sinks, 1)
        settle(sinks, 1)
        ledger.is_down = True
        end(sinks)
        assert not ServiceSink(ledger, tmp_path, waits=True).is_complete
        ledger.is_down = False
        end(start(tmp_path, ledger, resumed_step=1))
        assert ServiceSink(ledger, tmp_path, waits=True).is_complete
        write([MetricsFile(tmp_path)], 2)
        assert not ServiceSink(ledger, tmp_path, waits=True).is_complete, "a row is new"

    def test_a_damaged_state_file_is_a_new_run(self, tmp_path: Path) -> None:
        (tmp_path / "ledger_run.json").write_text(json.dumps({"run_id": "x"}))
        ledger = Ledger()
        sinks = start(tmp_path, ledger)
        write(sinks, 1)
        settle(sinks, 1)
        end(sinks)
        assert steps_of(ledger.runs["run0"]) == [1]


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_missing_package_is_one_line(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ConfigError, match=rf"logging.sinks: {name} cannot be imported.*\[{name}\]") as caught:
        check_sinks(["jsonl", name], "project")
    assert "\n" not in str(caught.value)
