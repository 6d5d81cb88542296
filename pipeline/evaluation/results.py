"""Find the results of evaluations in a run folder, and format them. This module does not import torch."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from pipeline.run_folder.layout import EVALUATION_FOLDER
from pipeline.run_folder.metrics import DIFFERENT_NUMBERS_KEY

VALIDATION = "validation"  # the task that scores token shards; all other tasks score text
CORE = "core"  # the task that scores nanochat's bundle of tasks
INTERVAL = "_interval"  # the suffix of the key of a 95% interval: ``acc_interval`` for ``acc``

Results = dict[str, dict[str, Any]]  # task -> figures, and facts about the data and the checkpoint


def find_results(
    run_folder: Path, tasks: Sequence[str], step: int, data: Mapping[str, str] = MappingProxyType({})
) -> Results | None:
    """Return the stored results of the tasks for the checkpoint of ``step``.

    Return None if a result is missing or damaged, or belongs to another step or to other data.

    Args:
        data: task -> the path of its data. Results of other tasks may belong to any data.
    """
    results = {}
    for task in tasks:
        path = run_folder / EVALUATION_FOLDER / f"{task}.json"
        try:
            result = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        if not isinstance(result, dict) or result.get("step") != step:
            return None
        path_of_data = data.get(task)
        if path_of_data and os.path.abspath(str(result.get("data"))) != os.path.abspath(path_of_data):
            return None
        results[task] = result
    return results


def format_table(results: Results) -> str:
    lines = []
    for task, result in results.items():
        lines.append(f"{task}  (step {result['step']}, {result['checkpoint']})")
        for key, value in result.items():
            if isinstance(value, float):
                interval = result.get(key + INTERVAL)
                bounds = "   [{:.4f}, {:.4f}]".format(*interval) if interval else ""
                lines.append(f"  {key:<18} {value:>14.4f}{bounds}")
            elif isinstance(value, int) and key != "step":
                lines.append(f"  {key:<18} {value:>14,}")
            elif key == DIFFERENT_NUMBERS_KEY:
                lines.append(f"  {'different numbers':<18} {', '.join(value)}")
        for name, figures in result.get("tasks", {}).items():  # the tasks of CORE
            bounds = "   [{:.4f}, {:.4f}]".format(*figures[f"acc{INTERVAL}"])
            lines.append(f"  {name:<34} acc {figures['acc']:.4f}{bounds}   centered {figures['centered']:.4f}")
        lines.extend(_format_losses(result.get("loss_by_position", [])))
    return "\n".join(lines)


def _format_losses(losses: list[float | None]) -> list[str]:
    """Return the mean loss of each range of positions: 0, 1, 2-3, 4-7, ..."""
    lines, low = [], 0
    while low < len(losses):
        high = min(max(2 * low, 1), len(losses))
        values = [loss for loss in losses[low:high] if loss is not None]
        if values:
            label = f"loss at {low}" if high - low == 1 else f"loss at {low}-{high - 1}"
            lines.append(f"  {label:<18} {sum(values) / len(values):>14.4f}")
        low = high
    return lines
