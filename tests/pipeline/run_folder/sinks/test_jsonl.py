"""What a run has logged can be read back, without gaps or duplicate steps, also after a crash or a full disk."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from pipeline.run_folder.layout import METRICS_FILE
from pipeline.run_folder.metrics import read_metrics
from pipeline.run_folder.sinks.jsonl import MetricsFile
from tests.pipeline.conftest import largest_file


def start(folder: Path, resumed_step: int = 0) -> MetricsFile:
    metrics = MetricsFile(folder)
    metrics.start({}, resumed_step)
    return metrics


def row(step: int, **more: float) -> dict[str, Any]:
    return {"step": step, "loss": 10.0 - step, "lr": step / 1000, **more}


def log_steps(folder: Path, steps: range, *, resumed_step: int = 0, **more: float) -> None:
    metrics = start(folder, resumed_step)
    for step in steps:
        metrics.write(row(step, **more))
    metrics.end({})


class TestRows:
    def test_rows_are_read_back(self, tmp_path: Path) -> None:
        log_steps(tmp_path / "new" / "run", range(1, 4), tokens_per_s=1.5)
        assert read_metrics(tmp_path / "new" / "run") == [row(step, tokens_per_s=1.5) for step in (1, 2, 3)]

    def test_a_row_is_on_the_disk_at_once(self, tmp_path: Path) -> None:
        metrics = start(tmp_path)
        metrics.write(row(1))
        assert read_metrics(tmp_path) == [row(1)]
        metrics.end({})

    def test_resume_drops_later_rows(self, tmp_path: Path) -> None:
        log_steps(tmp_path, range(1, 8), first=1.0)
        log_steps(tmp_path, range(5, 10), resumed_step=4, second=1.0)
        rows = read_metrics(tmp_path)
        assert [r["step"] for r in rows] == list(range(1, 10))
        assert [r["step"] for r in rows if "second" in r] == list(range(5, 10))

    def test_a_run_from_scratch_drops_all_rows(self, tmp_path: Path) -> None:
        log_steps(tmp_path, range(8))
        log_steps(tmp_path, range(2))
        assert [r["step"] for r in read_metrics(tmp_path)] == [0, 1]

    @pytest.mark.parametrize("resumed_step", [3, 2])
    def test_a_line_that_a_crash_cut_short_costs_no_other(self, tmp_path: Path, resumed_step: int) -> None:
        log_steps(tmp_path, range(1, 5))
        path = tmp_path / METRICS_FILE
        path.write_bytes(path.read_bytes()[:-9])  # in the middle of step 4
        assert [r["step"] for r in read_metrics(tmp_path)] == [1, 2, 3]
        log_steps(tmp_path, range(resumed_step + 1, 6), resumed_step=resumed_step)
        assert read_metrics(tmp_path) == [row(step) for step in range(1, 6)]

    def test_a_run_that_never_logged_has_no_rows(self, tmp_path: Path) -> None:
        assert read_metrics(tmp_path) == []


def test_a_rewind_drops_later_rows(tmp_path: Path) -> None:
    metrics = start(tmp_path)
    for step in (1, 2, 3, 4):
        metrics.write(row(step))
    metrics.rewind(2)
    for step in (3, 4):
        metrics.write({**row(step), "again": True})
    metrics.end({})
    assert [(written["step"], "again" in written) for written in read_metrics(tmp_path)] == [
        (1, False),
        (2, False),
        (3, True),
        (4, True),
    ]


class TestFullDisk:
    LINE_BYTES = len(json.dumps(row(1))) + 1

    @pytest.mark.parametrize("room_bytes", [0, 1, 17, LINE_BYTES - 1, LINE_BYTES, LINE_BYTES + 1])
    def test_rows_wait_and_are_written_whole_and_in_order(
        self, tmp_path: Path, room_bytes: int, caplog: pytest.LogCaptureFixture
    ) -> None:
        metrics = start(tmp_path)
        metrics.write(row(1))
        with caplog.at_level(logging.WARNING), largest_file(self.LINE_BYTES + room_bytes):
            for step in (2, 3, 4):
                metrics.write(row(step))
            written = 1 + room_bytes // self.LINE_BYTES
            assert (tmp_path / METRICS_FILE).read_bytes().endswith(b"}\n"), "the next row needs a line of its own"
            assert read_metrics(tmp_path) == [row(step) for step in range(1, written + 1)]
        assert caplog.text.count("cannot write metrics (File too large)") == 1, "once is enough"
        metrics.write(row(5))
        assert read_metrics(tmp_path) == [row(step) for step in range(1, 6)]
        metrics.end({})

    def test_a_rewind_while_the_disk_is_full(self, tmp_path: Path) -> None:
        metrics = start(tmp_path)
        for step in (1, 2):
            metrics.write(row(step))
        with largest_file(self.LINE_BYTES // 2):
            for step in (3, 4):
                metrics.write(row(step))
            metrics.rewind(3)
            metrics.write(row(4))
            assert read_metrics(tmp_path) == [row(1), row(2)]
        metrics.write(row(5))
        metrics.end({})
        assert read_metrics(tmp_path) == [row(step) for step in range(1, 6)]

    def test_two_rewinds_while_the_disk_is_full(self, tmp_path: Path) -> None:
        metrics = start(tmp_path)
        for step in range(1, 7):
            metrics.write(row(step))
        with largest_file(self.LINE_BYTES // 2):
            metrics.rewind(3)
            for step in (4, 5, 6, 7):
                metrics.write({**row(step), "again": True})
            metrics.rewind(5)
        metrics.write({**row(6), "again": True})
        metrics.end({})
        assert [(written["step"], "again" in written) for written in read_metrics(tmp_path)] == [
            *((step, False) for step in (1, 2, 3)),
            *((step, True) for step in (4, 5, 6)),
        ]

    def test_a_second_full_disk_is_logged_again(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        metrics = start(tmp_path)
        with caplog.at_level(logging.WARNING):
            for step in (1, 3):
                with largest_file((step - 1) * self.LINE_BYTES):
                    metrics.write(row(step))
                metrics.write(row(step + 1))
        assert caplog.text.count("cannot write metrics") == 2
        assert read_metrics(tmp_path) == [row(step) for step in (1, 2, 3, 4)]
        metrics.end({})

    def test_rows_that_were_never_written_are_counted_at_the_end(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        metrics = start(tmp_path)
        metrics.write(row(1))
        with caplog.at_level(logging.WARNING), largest_file(self.LINE_BYTES):
            for step in (2, 3):
                metrics.write(row(step))
            metrics.end({})
        assert "2 rows of metrics could not be written" in caplog.text
        assert read_metrics(tmp_path) == [row(1)]
