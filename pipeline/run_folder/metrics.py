"""Write and read the metrics of a run: the keys, the file ``metrics.jsonl``, and the lines on the console."""

import json
import logging
import math
from pathlib import Path
from typing import Any

from data_tools.storage.atomic import write_bytes_durably
from pipeline.run_folder.layout import METRICS_FILE

log = logging.getLogger(__name__)

#: The prefix of the keys for validation losses on single datasets of a mixture. The dataset's name follows.
DATASET_LOSS_PREFIX = "val_loss_"

#: The prefix of the keys for figures of tasks during training. The names of the task and of the figure follow.
TASK_PREFIX = "task_"

#: The key of the completion that the model has generated.
SAMPLE_KEY = "sample"

#: The key that lists the config keys that make a row's numbers differ from those of other backends.
DIFFERENT_NUMBERS_KEY = "different_numbers"

#: Row key -> format on the console. Other keys are in metrics.jsonl only.
_CONSOLE_FORMATS = {
    "loss": "loss {:.4f}",
    "val_loss": "validation loss {:.4f}",
    "val_perplexity": "perplexity {:.2f}",
    "lr": "lr {:.2e}",
    "grad_norm": "norm {:.3f}",
    "tokens_per_s": "{:,.0f} tokens/s",
    "mfu": "MFU {:.1%}",
    "step_ms": "{:,.0f} ms",
    "peak_memory_gib": "{:.2f} GiB",
    DIFFERENT_NUMBERS_KEY: "different numbers",
}

#: The losses by row key. The console also shows that a loss is null.
_LOSSES = {"loss": "loss", "val_loss": "validation loss"}


class MetricsFile:
    """Appends rows to ``metrics.jsonl``. While the disk is full or read-only, the rows are kept in memory.

    If an earlier start of the run has written rows for steps after ``resumed_step``, these rows are deleted, because
    the run will write them again.
    """

    def __init__(self, run_folder: Path, resumed_step: int) -> None:
        run_folder.mkdir(parents=True, exist_ok=True)
        self._run_folder = run_folder
        _drop_rows_after(run_folder, resumed_step)
        self._waiting: list[dict[str, Any]] = []
        self._rewind_to: int | None = None  # a step to rewind to once the disk can be written

    def write(self, row: dict[str, Any]) -> None:
        """Append one row. The row must have the key ``step``."""
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
        """Delete the rows of steps after ``step``, because the run will write these rows again."""
        self._waiting = [row for row in self._waiting if row["step"] <= step]
        self._rewind_to = step if self._rewind_to is None else min(step, self._rewind_to)

    def close(self) -> None:
        """Log how many rows could not be written, if there are any."""
        if self._waiting:
            log.warning("%d rows of metrics could not be written", len(self._waiting))


def _append_row(run_folder: Path, row: dict[str, Any]) -> None:
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
    kept = "".join(json.dumps(row) + "\n" for row in read_metrics(run_folder) if step and row["step"] <= step).encode()
    if path.exists() and path.read_bytes() != kept:  # also to drop an incomplete last line
        write_bytes_durably(path, kept)


def read_metrics(run_folder: Path) -> list[dict[str, Any]]:
    """Return the rows in ``metrics.jsonl``. Lines that are incomplete or damaged are left out and logged."""
    path = run_folder / METRICS_FILE
    if not path.exists():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if _is_row(row):
            rows.append(row)
        else:
            log.warning("%s: dropping a line that was cut short or damaged", path)
    return rows


def _is_row(row: Any) -> bool:
    """Return whether a JSON value is a row: an object with a step, and numbers or null where numbers are shown."""
    if not isinstance(row, dict) or type(row.get("step")) is not int:
        return False
    numbers = [key for key, pattern in _CONSOLE_FORMATS.items() if "{" in pattern]
    is_shown = all(isinstance(row.get(key), (int, float, type(None))) for key in numbers)
    return is_shown and isinstance(row.get("elapsed_s", 0), (int, float))


def format_row(row: dict[str, Any], max_steps: int) -> str:
    """Return a row as a line for the console, such as ``step 100/200 | loss 5.1234 | lr 6.00e-04 | ...``."""
    width = len(str(max_steps))
    figures = [pattern.format(row[key]) for key, pattern in _CONSOLE_FORMATS.items() if row.get(key) is not None]
    figures[:0] = [f"{name} null" for key, name in _LOSSES.items() if key in row and row[key] is None]
    return " | ".join([f"step {row['step']:>{width}}/{max_steps}", *figures])


def perplexity(loss: float) -> float:
    """Return exp(loss). A loss above 700 counts as 700, so that the result is finite. JSON cannot contain infinity."""
    return math.exp(min(loss, 700.0))
