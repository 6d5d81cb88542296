"""Where numbers go: ``metrics.jsonl``, TensorBoard, and one readable line on the console."""

from __future__ import annotations

import json
import logging
import math
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from data_tools.storage.atomic import write_bytes_durably
from pipeline.run_folder.layout import METRICS_FILE, TENSORBOARD_FOLDER

log = logging.getLogger(__name__)


#: What the keys of validation losses on the parts of a mixture begin with; a part's name follows.
PART_LOSS_PREFIX = "val_loss_"

#: What the keys of task figures begin with while training; the task and its figure follow.
TASK_PREFIX = "task_"

#: The key of a text that the model wrote.
SAMPLE_KEY = "sample"

# Row key -> TensorBoard tag. Keys that stand here are drawn; the others stay in metrics.jsonl.
TENSORBOARD_TAGS = {
    "loss": "train/loss",
    "val_loss": "validation/loss",
    "val_perplexity": "validation/perplexity",
    "lr": "optimizer/learning_rate",
    "grad_norm": "optimizer/grad_norm",
    "loss_scale": "optimizer/loss_scale",
    "tokens_per_s": "throughput/tokens_per_s",
    "mfu": "throughput/mfu",
    "step_ms": "throughput/step_ms",
    "data_wait_share": "throughput/data_wait_share",
    "peak_memory_gib": "memory/peak_gib",
    "skipped_steps": "guard/skipped_steps",
    "save_s": "checkpoint/save_s",
    "save_pause_s": "checkpoint/pause_s",
    "failed_saves": "checkpoint/failed_saves",
}

#: Of a config, what decides the result or the speed; the page would drown in the rest.
HYPERPARAMETER_SECTIONS = ("run", "model", "data", "batch", "optimizer", "schedule", "backend")

# TensorBoard's CUSTOM SCALARS page: group -> chart -> the tags in it, as regular expressions.
TENSORBOARD_LAYOUT = {
    "loss": {
        "training and validation": ["Multiline", ["^train/loss$", "^validation/loss$"]],
        "validation, each part of a mixture": ["Multiline", ["^validation/loss"]],
    },
    "optimizer": {
        "learning rate": ["Multiline", ["^optimizer/learning_rate$"]],
        "gradient norm before clipping": ["Multiline", ["^optimizer/grad_norm$"]],
    },
    "speed": {
        "tokens per second": ["Multiline", ["^throughput/tokens_per_s$"]],
        "MFU, and the share of time that waited for data": [
            "Multiline",
            ["^throughput/mfu$", "^throughput/data_wait_share$"],
        ],
    },
}


class MetricsLog:
    """Appends rows of a run. Only the main rank has one.

    Rows of steps after ``resumed_step`` are dropped when it opens: they were written after the
    checkpoint that the run continues from, and will be written again.

    A disk that is full or has become read-only does not stop the training: rows wait in memory until they
    can be written.
    """

    def __init__(self, run_folder: Path, *, resumed_step: int, tensorboard: bool) -> None:
        run_folder.mkdir(parents=True, exist_ok=True)
        self._path = run_folder / METRICS_FILE
        _keep_rows_until(self._path, resumed_step)
        self._file = self._path.open("ab", buffering=0)
        self._waiting: list[dict[str, Any]] = []
        self._rewind_to: int | None = None  # a step to go back to as soon as the disk lets us
        self._tensorboard_folder = str(run_folder / TENSORBOARD_FOLDER) if tensorboard else None
        self._writer: SummaryWriter | None = None
        self._open_writer(purge_step=resumed_step + 1 if resumed_step else 0)

    def write(self, row: dict[str, Any]) -> None:
        """Add one row; ``row["step"]`` is required."""
        self._waiting.append(row)
        try:
            self._rewind_file()
            while self._waiting:
                self._append(self._waiting[0])
                self._draw(self._waiting.pop(0))
        except OSError as error:
            if len(self._waiting) <= 1:
                log.warning("cannot write metrics (%s); they wait in memory", error.strerror)

    def rewind(self, step: int) -> None:
        """Drop the rows after ``step``: they will be written again."""
        self._waiting = [row for row in self._waiting if row["step"] <= step]
        self._rewind_to = step
        if self._writer:
            with suppress(OSError):
                self._writer.close()
        self._open_writer(purge_step=step + 1)

    def _rewind_file(self) -> None:
        if self._rewind_to is not None:
            _keep_rows_until(self._path, self._rewind_to)  # replaces the file
            self._file.close()
            self._file = self._path.open("ab", buffering=0)
            self._rewind_to = None

    def _append(self, row: dict[str, Any]) -> None:
        """The whole line, or nothing of it."""
        line = (json.dumps(row, allow_nan=False) + "\n").encode()
        end = self._file.seek(0, os.SEEK_END)
        written = 0
        try:
            while written < len(line):
                written += self._file.write(line[written:]) or 0
        except OSError:
            self._file.truncate(end)
            raise

    def _draw(self, row: dict[str, Any]) -> None:
        """TensorBoard's writer ends with the first error of its thread; a new one then takes its place."""
        if self._tensorboard_folder is None:
            return
        try:
            if self._writer is None:
                self._open_writer(purge_step=None)
            assert self._writer is not None
            for key, value in row.items():
                if value is not None and (tag := _tensorboard_tag(key)):
                    self._writer.add_scalar(tag, value, row["step"])
            if SAMPLE_KEY in row:
                self._writer.add_text("sample", _as_markdown(row[SAMPLE_KEY]), row["step"])
        except OSError as error:
            log.warning("cannot write TensorBoard events (%s); some are lost, metrics.jsonl has them", error.strerror)
            self._writer = None

    def _open_writer(self, purge_step: int | None) -> None:
        if self._tensorboard_folder is not None:
            self._writer = SummaryWriter(self._tensorboard_folder, purge_step=purge_step)
            self._writer.add_custom_scalars(TENSORBOARD_LAYOUT)

    def write_hyperparameters(self, config: dict[str, Any], results: dict[str, float]) -> None:
        """The run's settings beside its results, for TensorBoard's HPARAMS page."""
        if self._writer:
            settings = {
                f"{section}.{key}": _plain(value)
                for section, keys in config.items()
                if section in HYPERPARAMETER_SECTIONS
                for key, value in keys.items()
            }
            with suppress(OSError):  # reported when the rows before it met the same
                self._writer.add_hparams(settings, results, run_name=".")

    def close(self) -> None:
        """Flush and close all outputs."""
        if self._waiting:
            log.warning("%d rows of metrics could not be written", len(self._waiting))
        self._file.close()
        if self._writer:
            with suppress(OSError):
                self._writer.close()


def _tensorboard_tag(key: str) -> str | None:
    if key.startswith(PART_LOSS_PREFIX):
        return f"validation/loss_{key.removeprefix(PART_LOSS_PREFIX)}"
    if key.startswith(TASK_PREFIX):
        return f"tasks/{key.removeprefix(TASK_PREFIX)}"
    return TENSORBOARD_TAGS.get(key)


def _as_markdown(text: str) -> str:
    """A block of code: TensorBoard renders Markdown, and shows only such a block as it stands."""
    return "".join(f"    {line}\n" for line in text.splitlines())


def perplexity(loss: float) -> float:
    """exp(loss), kept inside what a float and JSON can hold."""
    return math.exp(min(loss, 700.0))


def _plain(value: Any) -> Any:
    return value if isinstance(value, bool | int | float | str) else json.dumps(value)


def read_metrics(run_folder: Path) -> list[dict[str, Any]]:
    """The rows of a run; a last line that was cut by a crash is left out."""
    path = run_folder / METRICS_FILE
    if not path.exists():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            log.warning("%s: dropping a line that was cut short", path)
    return rows


def _keep_rows_until(path: Path, step: int) -> None:
    rows = read_metrics(path.parent)
    kept = "".join(json.dumps(row) + "\n" for row in rows if step and row["step"] <= step).encode()
    if path.exists() and path.read_bytes() != kept:  # a torn last line, too, would swallow the next row
        write_bytes_durably(path, kept)


def format_row(row: dict[str, Any], max_steps: int) -> str:
    """A row as a person reads it: ``step 100/200 | loss 5.1234 | lr 6.00e-04 | ...``."""
    width = len(str(max_steps))
    parts = [f"step {row['step']:>{width}}/{max_steps}"]
    for key, pattern in _CONSOLE_PATTERNS.items():
        if row.get(key) is not None:
            parts.append(pattern.format(row[key]))
    return " | ".join(parts)


_CONSOLE_PATTERNS = {
    "loss": "loss {:.4f}",
    "val_loss": "validation loss {:.4f}",
    "val_perplexity": "perplexity {:.2f}",
    "lr": "lr {:.2e}",
    "grad_norm": "norm {:.3f}",
    "tokens_per_s": "{:,.0f} tokens/s",
    "mfu": "MFU {:.1%}",
    "step_ms": "{:,.0f} ms",
    "peak_memory_gib": "{:.2f} GiB",
}
