"""What a run folder tells: settings, rows, results. A run in progress is as good as a finished one."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import ReportError
from pipeline.evaluation.results import Results
from pipeline.run_folder.layout import CONFIG_FILE, EVALUATION_FOLDER, METRICS_FILE
from pipeline.run_folder.metrics import read_metrics

Row = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """One run as its folder has it."""

    label: str  # tells it from the other runs of a report
    settings: dict[str, str]  # dotted key -> JSON value, resolved
    rows: list[Row]
    results: Results

    @property
    def training(self) -> list[Row]:
        """The rows of optimizer steps."""
        return [row for row in self.rows if "loss" in row]

    @property
    def validation(self) -> list[Row]:
        """The rows of validations."""
        return [row for row in self.rows if "val_loss" in row]

    @property
    def starts(self) -> list[Row]:
        """What it computed on: the rows that stand where it started and went on."""
        return [row for row in self.rows if "started" in row]

    def values(self, key: str) -> list[Any]:
        """What the rows have under a key, in order."""
        return [row[key] for row in self.rows if row.get(key) is not None]

    def last(self, key: str) -> Any:
        """The last value of a key; None: there is none."""
        return next(iter(reversed(self.values(key))), None)


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """Read run folders.

    Raises:
        ReportError: one of them holds no run.
    """
    return [_read_run(folder, label) for folder, label in zip(folders, _labels(folders), strict=True)]


def _labels(folders: Sequence[Path]) -> list[str]:
    """The folders' names, with as much of what stands before them as tells them apart."""
    resolved = [folder.resolve() for folder in folders]
    if len(set(resolved)) < len(resolved):
        raise ReportError("a run is given twice; name each run once")
    depth = 1
    while len(labels := {"/".join(folder.parts[-depth:]) for folder in resolved}) < len(resolved):
        depth += 1
    assert len(labels) == len(resolved)
    return ["/".join(folder.parts[-depth:]) for folder in resolved]


def _read_run(folder: Path, label: str) -> Run:
    if not (folder / METRICS_FILE).is_file():
        raise ReportError(f"{folder}: no run here, there is no {METRICS_FILE}; give what run.out_dir named")
    return Run(label, _read_settings(folder / CONFIG_FILE), read_metrics(folder), _read_results(folder))


def _read_settings(path: Path) -> dict[str, str]:
    if not path.is_file():
        return {}
    return dict(flattened(_read_json(path)))


def _read_results(folder: Path) -> Results:
    return {path.stem: _read_json(path) for path in sorted((folder / EVALUATION_FOLDER).glob("*.json"))}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ReportError(f"{path}: not valid JSON ({error}); remove it, or write it again") from None
    if not isinstance(content, dict):
        raise ReportError(f"{path}: expected a JSON object; remove it, or write it again")
    return content


def flattened(section: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Dotted keys and JSON values of nested objects."""
    for key, value in section.items():
        if isinstance(value, dict) and value:
            yield from flattened(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", json.dumps(value)


def differing_settings(columns: Sequence[dict[str, str]]) -> dict[str, list[str]]:
    """Key -> its value in each column, of the keys whose values are not the same in all."""
    keys = dict.fromkeys(key for column in columns for key in column)
    values = {key: [column.get(key, "") for column in columns] for key in keys}
    return {key: found for key, found in values.items() if len(set(found)) > 1}
