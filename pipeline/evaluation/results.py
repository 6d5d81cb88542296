"""Find the results of evaluations in a run folder, and format them. This module does not import torch."""

import logging
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from data_tools.errors import UserError
from data_tools.shards.manifest import load_manifest
from data_tools.storage.files import is_remote
from data_tools.storage.json_values import sha256_of_json
from data_tools.storage.sha256 import sha256_of_file
from pipeline.checkpoint.json_files import read_json_object
from pipeline.checkpoint.manifest import read_manifest
from pipeline.config.paths import find_path
from pipeline.config.schema import Config
from pipeline.errors import CheckpointError
from pipeline.evaluation.intervals import TOO_FEW
from pipeline.run_folder.layout import EVALUATION_FOLDER, run_folder_of
from pipeline.run_folder.metrics import DIFFERENT_NUMBERS_KEY

log = logging.getLogger(__name__)

VALIDATION = "validation"  # the task that scores token shards; all other tasks score text
CORE = "core"  # the task that scores nanochat's bundle of tasks
INTERVAL = "_interval"  # the suffix of the key of a 95% interval: ``acc_interval`` for ``acc``

Results = dict[str, dict[str, Any]]  # task -> figures, and facts about the data and the checkpoint


def find_results(checkpoint: Path, config: Config) -> Results | None:
    """Return the stored results of ``evaluation.tasks`` for a checkpoint of a run.

    Return None if a result is missing or damaged, or belongs to other weights, to another precision than
    ``run.precision`` or to other data. For a dataset on the Hugging Face hub, the function only checks that the result
    is of the hub, and not of a file.
    """
    results = {}
    try:
        sha256 = read_manifest(checkpoint).weights_sha256()
        for task in config.evaluation.tasks:
            result = read_json_object(run_folder_of(checkpoint) / EVALUATION_FOLDER / f"{task}.json")
            is_of_run = (result["weights_sha256"], result["precision"]) == (sha256, config.run.precision)
            if not is_of_run or not _is_of_data(result, task, config):
                return None
            results[task] = result
    except (OSError, KeyError, UserError):  # the evaluation itself reports data that cannot be read
        return None
    return results


def set_aside_results(run_folder: Path, step: int) -> None:
    """Rename the results of checkpoints after ``step``, because the run continues from this step."""
    for path in sorted((run_folder / EVALUATION_FOLDER).glob("*.json")):
        with suppress(CheckpointError):  # a damaged file
            found = read_json_object(path).get("step")
            if isinstance(found, int) and found > step:
                abandoned = path.rename(f"{path}.abandoned")
                log.warning("set aside as %s: the run continues from step %d", abandoned, step)


def _is_of_data(result: dict[str, Any], task: str, config: Config) -> bool:
    sha256 = _hash_data(task, config)
    return is_remote(str(result["data"])) if sha256 is None else bool(result["data_sha256"] == sha256)


def _hash_data(task: str, config: Config) -> str | None:
    """Return the SHA-256 of the data of a task, or None if the data is on the Hugging Face hub."""
    path = config.evaluation.data.get(task)
    if path is None and task == VALIDATION:
        if config.data.mixture is not None:
            return hash_mixture(config)
        path = config.data.path
    if path is None:
        return None
    path = find_path(path, config.run)
    if task == VALIDATION:
        return load_manifest(path).content_sha256()
    return hash_folder(Path(path)) if task == CORE else sha256_of_file(Path(path))


def hash_mixture(config: Config) -> str:
    """Return a SHA-256 of the names, contents and weights of the datasets in ``data.mixture``."""
    components = [(find_path(component.path, config.run), component) for component in config.data.components]
    return sha256_of_json({c.name: [load_manifest(path).content_sha256(), c.weight] for path, c in components})


def hash_folder(folder: Path) -> str:
    """Return a SHA-256 of the names and contents of the files in a folder and its subfolders."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return sha256_of_json({path.relative_to(folder).as_posix(): sha256_of_file(path) for path in files})


def format_table(results: Results) -> str:
    """Return the results as text, with one line per figure and the 95% intervals beside the figures."""
    lines = []
    for task, result in results.items():
        width = max(18, *(len(key) for key, value in result.items() if isinstance(value, int | float)))
        lines.append(f"{task}  (step {result['step']}, {result['checkpoint']})")
        for key, value in result.items():
            if isinstance(value, float):
                bounds = _format_interval(result[key + INTERVAL]) if key + INTERVAL in result else ""
                lines.append(f"  {key:<{width}} {value:>14.4f}{bounds}")
            elif isinstance(value, int) and key != "step":
                lines.append(f"  {key:<{width}} {value:>14,}")
            elif key == DIFFERENT_NUMBERS_KEY:
                lines.append(f"  {'different numbers':<{width}} {', '.join(value)}")
        for name, figures in result.get("tasks", {}).items():  # the tasks of CORE
            bounds = _format_interval(figures[f"acc{INTERVAL}"])
            lines.append(f"  {name:<34} acc {figures['acc']:.4f}{bounds}   centered {figures['centered']:.4f}")
        lines.extend(_format_losses(result.get("loss_by_position", [])))
    return "\n".join(lines)


def _format_interval(bounds: Sequence[float] | None) -> str:
    return "   95% interval " + ("[{:.4f}, {:.4f}]".format(*bounds) if bounds else TOO_FEW)


def _format_losses(losses: list[float | None]) -> list[str]:
    """Return a heading, and the mean loss of each range of positions: 0, 1, 2-3, 4-7, ..."""
    lines, low = [], 0
    while low < len(losses):
        high = min(max(2 * low, 1), len(losses))
        values = [loss for loss in losses[low:high] if loss is not None]
        if values:
            label = f"{low}" if high - low == 1 else f"{low}-{high - 1}"
            lines.append(f"    {label:<16} {sum(values) / len(values):>14.4f}")
        low = high
    return ["  loss by position in the window", *lines] if lines else []
