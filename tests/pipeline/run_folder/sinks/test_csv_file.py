"""The table has the rows of ``metrics.jsonl``, also after new keys, a resume, a rollback and a full disk."""

from __future__ import annotations

import csv
import json
import logging
from pathlib import Path
from typing import Any

import pytest

from pipeline.run_folder.layout import TABLE_FILE
from pipeline.run_folder.metrics import read_metrics
from pipeline.run_folder.sinks import create_sinks
from pipeline.run_folder.sinks.sink import Sink
from tests.pipeline.conftest import largest_file


def start(folder: Path, resumed_step: int = 0) -> list[Sink]:
    sinks = create_sinks(["csv", "jsonl"], folder, "project", waits_for_checkpoint=True)
    for sink in sinks:
        sink.start({}, resumed_step)
    return sinks


def write(sinks: list[Sink], *rows: dict[str, Any]) -> None:
    for row in rows:
        for sink in sinks:
            sink.write(row)


def row(step: int, **more: Any) -> dict[str, Any]:
    return {"step": step, "elapsed_s": step / 4, "loss": 10.0 - step, **more}


def assert_equals_jsonl(folder: Path) -> list[dict[str, Any]]:
    """Check that each cell is the value of the same row and key in ``metrics.jsonl``; return the rows."""
    rows = read_metrics(folder)
    with (folder / TABLE_FILE).open(newline="") as file:
        table = list(csv.DictReader(file))
    assert len(table) == len(rows)
    for cells, values in zip(table, rows, strict=True):
        filled = {key: cell for key, cell in cells.items() if cell}
        assert filled.keys() == {key for key, value in values.items() if value is not None}
        for key, cell in filled.items():
            assert cell == values[key] if isinstance(values[key], str) else json.loads(cell) == values[key]
    return rows


def test_each_kind_of_value_has_a_cell(tmp_path: Path) -> None:
    write(
        start(tmp_path),
        row(0, started={"backend": "ddp", "world_size": 2}),
        row(1),
        row(2, sample='two lines,\n"quoted"'),
        row(3, loss=None, skipped_samples=[4, 8]),
        row(4),
    )
    assert len(assert_equals_jsonl(tmp_path)) == 5
    assert (tmp_path / TABLE_FILE).read_text().startswith("step,elapsed_s,loss,started,sample,skipped_samples\n")


def test_a_resume_and_a_rollback_drop_rows(tmp_path: Path) -> None:
    write(start(tmp_path), *(row(step) for step in range(1, 8)))
    sinks = start(tmp_path, resumed_step=4)
    write(sinks, *(row(step, second=1) for step in range(5, 9)))
    for sink in sinks:
        sink.rewind(6)
    write(sinks, row(6, left_out_samples=[1, 2]), row(7), row(8))
    assert [r["step"] for r in assert_equals_jsonl(tmp_path)] == [1, 2, 3, 4, 5, 6, 6, 7, 8]


def test_a_full_disk_is_logged_once_and_the_table_is_completed_later(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sinks = start(tmp_path)
    write(sinks, row(1))
    with caplog.at_level(logging.WARNING), largest_file(20):
        write(sinks, row(2), row(3), row(4, new=1))
    assert caplog.text.count(TABLE_FILE) == 1
    write(sinks, row(5))
    assert [r["step"] for r in assert_equals_jsonl(tmp_path)] == [1, 2, 3, 4, 5]
