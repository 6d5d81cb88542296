"""Read the settings, metrics and results in a run folder. The run may still be in progress."""

import itertools
import json
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.checkpoint.layout import list_checkpoints
from pipeline.checkpoint.manifest import read_manifest
from pipeline.errors import CheckpointError, ReportError
from pipeline.evaluation.results import Results
from pipeline.run_folder.layout import CONFIG_FILE, EVALUATION_FOLDER, METRICS_FILE
from pipeline.run_folder.metrics import read_metrics

Row = dict[str, Any]


@dataclass(frozen=True)
class Run:
    label: str  # unique among the runs of a report
    settings: dict[str, str]  # dotted key -> JSON value, resolved
    rows: list[Row]
    results: Results
    outdated: frozenset[str] = frozenset()  # the tasks whose results are of other weights than the newest checkpoint's

    def values(self, key: str) -> list[Any]:
        """Return all values of a key in the metrics, in order. Nulls are left out."""
        return [row[key] for row in self.rows if row.get(key) is not None]

    def last(self, key: str) -> Any:
        """Return the last value of a key in the metrics, or None if there is no value."""
        return next(reversed(self.values(key)), None)


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """Read the settings, metrics and results of several run folders.

    Raises:
        ReportError: a folder has no metrics, a folder is given twice, or a JSON file is damaged.
    """
    return [_read_run(folder, label) for folder, label in zip(folders, _labels(folders), strict=True)]


def _labels(folders: Sequence[Path]) -> list[str]:
    """Return the folders' names. Parent folders are added until all names are unique."""
    resolved = [folder.resolve() for folder in folders]
    if len(set(resolved)) < len(resolved):
        raise ReportError("a run is given twice; name each run once")
    candidates = (["/".join(folder.parts[-depth:]) for folder in resolved] for depth in itertools.count(1))
    return next(labels for labels in candidates if len(set(labels)) == len(labels))


def _read_run(folder: Path, label: str) -> Run:
    if not (folder / METRICS_FILE).is_file():
        raise ReportError(
            f"{folder}: has no {METRICS_FILE}, so no run has trained here; give the folder of run.out_dir of a run"
        )
    config = folder / CONFIG_FILE
    settings = dict(flatten(_read_json(config))) if config.is_file() else {}
    results = {path.stem: _read_json(path) for path in sorted((folder / EVALUATION_FOLDER).glob("*.json"))}
    return Run(label, settings, read_metrics(folder, warns=True), results, _find_outdated(folder, results))


def _find_outdated(folder: Path, results: Results) -> frozenset[str]:
    """Return the tasks whose results are of other weights than the newest checkpoint's. Without one, return no task."""
    checkpoints = list_checkpoints(folder)
    if not checkpoints or not results:
        return frozenset()
    with suppress(CheckpointError):  # a run in progress may delete the checkpoint
        manifest = read_manifest(checkpoints[-1])
        newest = {weights: manifest.weights_sha256(weights) for weights in ("training", "ema")}
        return frozenset(
            task
            for task, result in results.items()
            if result.get("weights_sha256") != newest.get(result.get("weights", "training"))
        )
    return frozenset()


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ReportError(f"{path}: not valid JSON ({error}); remove it, or write it again") from None
    if not isinstance(content, dict):
        raise ReportError(f"{path}: expected a JSON object; remove it, or write it again")
    return content


def flatten(section: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield (dotted key, JSON text) for each value in nested objects."""
    for key, value in section.items():
        if isinstance(value, dict) and value:
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", json.dumps(value)
