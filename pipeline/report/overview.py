"""Describe each run in a folder in one line: its state, progress, speed, age, size and last checkpoint."""

import json
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data_tools.formatting import format_size, printable
from pipeline.checkpoint.layout import list_checkpoints, step_of
from pipeline.checkpoint.state import read_state_file
from pipeline.errors import CheckpointError, ReportError
from pipeline.run_folder.heartbeat_file import STALE_AFTER_S, heartbeat_age_s
from pipeline.run_folder.layout import CHECKPOINTS_FOLDER, CONFIG_FILE, METRICS_FILE
from pipeline.run_folder.lock import is_locked
from pipeline.run_folder.metrics import MEAN_LOSS_KEY, read_metrics

#: The states of a run that has trained. A stale run has not ended, but writes no heartbeat. A failed run has ended
#: before its last step, because of an error or a kill.
STATES = ("running", "stale", "finished", "interrupted", "failed")
#: The states of a run with checkpoints that were not written by launch/train.py.
AVERAGED, NOT_STARTED = "averaged", "not started"

_COLUMNS = ("run", "state", "step", "loss", "val. loss", "tokens/s", "age", "size", "last checkpoint")
_LEFT_COLUMNS = (0, 1, 8)


@dataclass(frozen=True)
class RunSummary:
    """The state and the progress of one run. Numbers that the run has not written yet are None."""

    folder: str
    state: str
    step: int
    max_steps: int | None
    loss: float | None  # as in the last training line; of the last step if an earlier version wrote the rows
    val_loss: float | None
    tokens_per_s: float | None
    age_s: float  # seconds since the last row; if there are no rows, since the last change of the folder
    size_bytes: int
    last_checkpoint: str | None
    last_checkpoint_step: int | None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def summarize_runs(folder: Path) -> list[RunSummary]:
    """Return the runs in a folder and in its sub-folders, the most recently active first.

    Runs without metrics, such as imported models, are included.

    Raises:
        ReportError: there is no run.
    """
    names = (METRICS_FILE, CHECKPOINTS_FOLDER, CONFIG_FILE)
    paths = {path for depth in ("", "*/", "*/*/") for name in names for path in folder.glob(f"{depth}{name}")}
    found = {path.parent for path in paths if path.name != CONFIG_FILE or _read_max_steps(path.parent) is not None}
    if not found:
        raise ReportError(f"{folder}: no run here; give a folder that contains run folders, such as runs")
    return sorted((summarize_run(run) for run in found), key=lambda run: run.age_s)


def summarize_run(folder: Path) -> RunSummary:
    rows = read_metrics(folder)
    checkpoints = list_checkpoints(folder)
    steps = [row["step"] for row in rows] + [step_of(checkpoint) for checkpoint in checkpoints]
    step, max_steps = max(steps, default=0), _read_max_steps(folder)
    return RunSummary(
        folder=str(folder),
        state=_state(folder, rows, checkpoints, is_complete=max_steps is not None and step >= max_steps),
        step=step,
        max_steps=max_steps,
        loss=_last(rows, MEAN_LOSS_KEY) if any(MEAN_LOSS_KEY in row for row in rows) else _last(rows, "loss"),
        val_loss=_last(rows, "val_loss"),
        tokens_per_s=_last(rows, "tokens_per_s"),
        age_s=max(0.0, time.time() - _last_written(folder)),
        size_bytes=sum(_file_sizes(folder)),
        last_checkpoint=str(checkpoints[-1]) if checkpoints else None,
        last_checkpoint_step=step_of(checkpoints[-1]) if checkpoints else None,
    )


def _last_written(folder: Path) -> float:
    """Return the Unix time of the run's last row, or of the folder's last change if there are no rows."""
    metrics = folder / METRICS_FILE
    return (metrics if metrics.is_file() else folder).stat().st_mtime


def _state(folder: Path, rows: Sequence[dict[str, Any]], checkpoints: Sequence[Path], *, is_complete: bool) -> str:
    if is_locked(folder):
        age_s = heartbeat_age_s(folder)  # None if an older version of this program writes to the folder
        return "stale" if age_s is not None and age_s > STALE_AFTER_S else "running"
    if checkpoints and not rows:
        with suppress(CheckpointError):
            return AVERAGED if read_state_file(checkpoints[-1]).averaged_steps else NOT_STARTED
    marks = [row for row in rows if "started" in row or "ended" in row]
    if marks and marks[-1].get("ended") in STATES:
        return str(marks[-1]["ended"])
    return "finished" if is_complete else "failed"


def _read_max_steps(folder: Path) -> int | None:
    with suppress(OSError, ValueError, KeyError, TypeError):
        return int(json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))["schedule"]["max_steps"])
    return None


def _last(rows: Sequence[dict[str, Any]], key: str) -> Any:
    return next((row[key] for row in reversed(rows) if row.get(key) is not None), None)


def _file_sizes(folder: Path) -> Iterator[int]:
    """Yield the sizes of all files. A running run may delete a file at any time."""
    for parent, _, names in os.walk(folder):
        for name in names:
            with suppress(OSError):
                yield os.lstat(os.path.join(parent, name)).st_size


def format_table(runs: Sequence[RunSummary]) -> str:
    table = [_COLUMNS, *(_cells(run) for run in runs)]
    widths = [max(len(row[column]) for row in table) for column in range(len(_COLUMNS))]
    lines = []
    for row in table:
        cells = [
            f"{cell:<{width}}" if column in _LEFT_COLUMNS else f"{cell:>{width}}"
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def _cells(run: RunSummary) -> tuple[str, ...]:
    return (
        printable(run.folder, line_breaks=False),
        run.state,
        f"{run.step:,}/{run.max_steps:,}" if run.max_steps else f"{run.step:,}",
        "" if run.loss is None else f"{run.loss:.4f}",
        "" if run.val_loss is None else f"{run.val_loss:.4f}",
        "" if run.tokens_per_s is None else f"{run.tokens_per_s:,.0f}",
        _format_age(run.age_s),
        format_size(run.size_bytes),
        "" if run.last_checkpoint is None else Path(run.last_checkpoint).name,
    )


def _format_age(seconds: float) -> str:
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"
