"""Write the rows to ``metrics.jsonl``. Resuming, reports and the other sinks read this file."""

import json
import logging
from pathlib import Path
from typing import Any

from data_tools.storage.atomic import write_bytes_durably
from pipeline.run_folder.layout import METRICS_FILE
from pipeline.run_folder.metrics import read_metrics
from pipeline.run_folder.sinks.sink import Row, Sink

log = logging.getLogger(__name__)


class MetricsFile(Sink):
    """Appends rows to ``metrics.jsonl``. While the disk is full or read-only, the rows wait in memory."""

    def __init__(self, run_folder: Path) -> None:
        self._run_folder = run_folder
        self._waiting: list[Row] = []
        self._rewind_to: int | None = None  # a step to rewind to once the disk can be written

    def start(self, config: dict[str, Any], resumed_step: int) -> None:
        self._run_folder.mkdir(parents=True, exist_ok=True)
        _drop_rows_after(self._run_folder, resumed_step)

    def write(self, row: Row) -> None:
        self._waiting.append(row)
        try:
            if self._rewind_to is not None:
                _drop_rows_after(self._run_folder, self._rewind_to)
                self._rewind_to = None
            while self._waiting:
                _append_row(self._run_folder, self._waiting[0])
                self._waiting.pop(0)
        except OSError as error:
            if len(self._waiting) <= 1:
                log.warning("cannot write metrics (%s); they wait in memory", error.strerror)

    def rewind(self, step: int) -> None:
        self._waiting = [row for row in self._waiting if row["step"] <= step]
        self._rewind_to = step if self._rewind_to is None else min(step, self._rewind_to)

    def end(self, summary: Row) -> None:
        if self._waiting:
            log.warning("%d rows of metrics could not be written", len(self._waiting))


def _append_row(run_folder: Path, row: Row) -> None:
    """Append a row to the file. If writing fails, remove the incomplete line and raise OSError."""
    line = (json.dumps(row, allow_nan=False) + "\n").encode()
    with (run_folder / METRICS_FILE).open("ab", buffering=0) as file:
        end = file.tell()
        written = 0
        try:
            while written < len(line):
                written += file.write(line[written:]) or 0
        except OSError:
            file.truncate(end)
            raise


def _drop_rows_after(run_folder: Path, step: int) -> None:
    path = run_folder / METRICS_FILE
    rows = read_metrics(run_folder, warns=True) if step else []
    kept = "".join(json.dumps(row) + "\n" for row in rows if row["step"] <= step).encode()
    if path.exists() and path.read_bytes() != kept:  # also to drop an incomplete last line
        write_bytes_durably(path, kept)
