"""Write the rows as a table, ``metrics.csv``, for spreadsheets and for ``pandas.read_csv``."""

import csv
import io
import json
import logging
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from data_tools.storage.atomic import write_bytes_durably
from pipeline.run_folder.layout import TABLE_FILE
from pipeline.run_folder.metrics import read_metrics
from pipeline.run_folder.sinks.sink import Row, Sink

log = logging.getLogger(__name__)

_FIRST_COLUMNS = ("step", "elapsed_s")


class CsvFile(Sink):
    """Appends rows to ``metrics.csv``, with one column per key.

    The whole table is written again from ``metrics.jsonl`` if a row has a new key, if rows were deleted, or if a write
    has failed.
    """

    def __init__(self, run_folder: Path) -> None:
        self._run_folder = run_folder
        self._path = run_folder / TABLE_FILE
        self._columns: list[str] = []
        self._is_current = False  # whether the table has all rows before the next one

    def start(self, config: dict[str, Any], resumed_step: int) -> None:
        self._is_current = self._try(self._write_table)

    def write(self, row: Row) -> None:
        if self._is_current and row.keys() <= set(self._columns):
            self._is_current = self._try(lambda: self._append(row))
        else:
            self._is_current = self._try(self._write_table, warns=self._is_current)

    def rewind(self, step: int) -> None:
        self._is_current = False

    def _write_table(self) -> None:
        rows = read_metrics(self._run_folder)
        self._columns = list(dict.fromkeys([*_FIRST_COLUMNS, *(key for row in rows for key in row)]))
        header = dict(zip(self._columns, self._columns, strict=True))
        write_bytes_durably(self._path, _format_lines([header, *rows], self._columns))

    def _append(self, row: Row) -> None:
        with self._path.open("ab") as file:
            file.write(_format_lines([row], self._columns))

    def _try(self, write: Callable[[], None], *, warns: bool = True) -> bool:
        try:
            write()
        except OSError as error:
            if warns:
                log.warning("cannot write %s (%s); metrics.jsonl has the rows", self._path, error.strerror)
            return False
        return True


def _format_lines(rows: Iterable[Row], columns: list[str]) -> bytes:
    """Return the lines of rows. A null is an empty cell, and a list or an object is JSON."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    for row in rows:
        writer.writerow({key: json.dumps(cell) if isinstance(cell, list | dict) else cell for key, cell in row.items()})
    return text.getvalue().encode()
