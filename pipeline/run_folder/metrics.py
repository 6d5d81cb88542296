"""Define the keys of the rows of metrics, read ``metrics.jsonl``, and format rows for the console."""

import json
import logging
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.run_folder.layout import METRICS_FILE

log = logging.getLogger(__name__)

#: Prefix + dataset name: the validation loss on one dataset of a mixture.
DATASET_LOSS_PREFIX = "val_loss_"

#: Prefix + task + figure: a figure of an evaluation task during training.
TASK_PREFIX = "task_"

#: Prefix + norm + "/" + layer group: a norm of a layer group.
LAYER_PREFIX = "layer_"

#: The completion that the model has generated.
SAMPLE_KEY = "sample"

#: Row key -> list of ``backend.deepspeed`` keys that can make the results differ from those of other backends.
DIFFERENT_NUMBERS_KEY = "different_numbers"

#: The mean loss of the steps since the previous training row.
MEAN_LOSS_KEY = "mean_loss"

#: Row key -> format on the console. The console shows no other keys. Fixed widths align the columns of training rows.
_CONSOLE_FORMATS = {
    MEAN_LOSS_KEY: "loss {:7.4f}",
    "val_loss": "validation loss {:.4f}",
    "val_perplexity": "perplexity {:.2f}",
    "val_ema_loss": "averaged weights {:.4f}",
    "grad_norm": "norm {:6.3f}",
    "tokens_per_s": "{:>7,.0f} tokens/s",
}

_SPEED_KEYS = ("tokens_per_s", "step_ms", "mfu", "peak_memory_gib")

#: The losses by row key. The console shows them even if they are null.
LOSSES = {MEAN_LOSS_KEY: "loss", "val_loss": "validation loss"}


def read_metrics(run_folder: Path, *, warns: bool = False) -> list[dict[str, Any]]:
    """Return the rows in ``metrics.jsonl``. Incomplete and damaged lines are left out.

    Args:
        warns: whether to log the lines that are left out. A run reads the file many times, and logs them only when it
            removes them from the file.
    """
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
        elif warns:
            log.warning("%s: dropping a line that was cut short or damaged", path)
    return rows


def _is_row(row: Any) -> bool:
    """Return whether a JSON value is a row: an object with a step. Metrics on the console must be numbers or null."""
    if not isinstance(row, dict) or type(row.get("step")) is not int:
        return False
    numbers = ("loss", "lr", *_SPEED_KEYS, *_CONSOLE_FORMATS)
    is_shown = all(isinstance(row.get(key), (int, float, type(None))) for key in numbers)
    return is_shown and isinstance(row.get("elapsed_s", 0), (int, float))


def format_row(row: dict[str, Any], max_steps: int) -> str:
    """Return a row as a line for the console, such as ``step 100/200 | loss  5.1234 | norm  1.234 | ...``."""
    figures = [pattern.format(row[key]) for key, pattern in _CONSOLE_FORMATS.items() if row.get(key) is not None]
    figures[:0] = [f"{name} null" for key, name in LOSSES.items() if key in row and row[key] is None]
    return " | ".join([format_step(row, max_steps), *figures])


def format_step(row: dict[str, Any], max_steps: int) -> str:
    """Return the step of a row, such as ``step 100/200``."""
    return f"step {row['step']:>{len(str(max_steps))}}/{max_steps}"


def speed_rows(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the training rows without the first one after each start, which includes the time to compile.

    If there are no other training rows, return these first ones.
    """
    first: list[dict[str, Any]] = []
    later: list[dict[str, Any]] = []
    has_started = False
    for row in rows:
        if "started" in row:
            has_started = True
        elif row.get("tokens_per_s") is not None:
            (first if has_started else later).append(row)
            has_started = False
    return later or first


def median_of(rows: Sequence[dict[str, Any]], key: str) -> float | None:
    """Return the median of the values of a key, or None if there are no values. Nulls are left out."""
    values = [row[key] for row in rows if row.get(key) is not None]
    return statistics.median(values) if values else None


def describe_speed(rows: Sequence[dict[str, Any]]) -> str:
    """Describe the median speed and the highest peak memory of the training rows. Without such rows, return ""."""
    trained = speed_rows(rows)
    formats = {"tokens_per_s": "{:,.0f} tokens/s", "step_ms": "{:,.0f} ms per step", "mfu": "{:.1%} of the ceiling"}
    medians = {key: median_of(trained, key) for key in formats}
    speed = ", ".join(formats[key].format(median) for key, median in medians.items() if median is not None)
    peaks = [row["peak_memory_gib"] for row in rows if row.get("peak_memory_gib") is not None]
    memory = [f"peak memory {max(peaks):.2f} GiB"] if peaks else []
    return "; ".join([f"median {speed}", *memory]) if speed else ""


def perplexity(loss: float) -> float:
    """Return exp(loss). A loss above 700 counts as 700, because JSON has no infinity."""
    return math.exp(min(loss, 700.0))
