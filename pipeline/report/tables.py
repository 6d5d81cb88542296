"""Create the tables of a report, with one row per value and one column per run."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from data_tools.formatting import format_duration
from pipeline.config.loading import dump_config
from pipeline.config.schema import Config, describe_model
from pipeline.report.runs import Run, flatten
from pipeline.run_folder.metrics import median_of, speed_rows

#: Settings that only name a run.
NAMING = ("run.name", "run.out_dir")
#: Settings that the summary shows for every run.
SHOWN = ("run.precision", "run.compile", "batch.tokens_per_step", "optimizer.learning_rate")
_MODEL = "model."  # the prefix of the keys that determine the model
#: Keys of a result that are not measurements.
HEADS = ("task", "step", "checkpoint", "weights_sha256")
_OUTDATED = ", not the weights of the newest checkpoint"


@dataclass(frozen=True)
class Table:
    """A table of texts. Each row has a name and one cell per column."""

    columns: list[str]
    rows: dict[str, list[str]] = field(default_factory=dict)


def summary_table(runs: Sequence[Run]) -> Table:
    """Return a table with the main settings, the progress and the losses of each run."""
    facts = [_facts(run) for run in runs]
    names = dict.fromkeys(name for column in facts for name in column)
    return Table([run.label for run in runs], {name: [column.get(name, "") for column in facts] for name in names})


def _facts(run: Run) -> dict[str, str]:
    starts = [row for row in run.rows if "started" in row]  # written at the start and at each resume
    facts = {
        "started": "\n".join(_format_time(row["started"]["time"]) for row in starts if "time" in row["started"]),
        "data": _describe_data(run.settings),
    }
    model = {key.removeprefix(_MODEL): json.loads(run.settings[key]) for key in run.settings if key.startswith(_MODEL)}
    facts |= {"model": describe_model(model)} if model else {}
    facts |= {key: run.settings[key].strip('"') for key in SHOWN if key in run.settings}
    if starts:
        facts["parameters"] = f"{starts[-1]['started']['parameters']:,}"
    facts["computed on"] = "\n".join(_describe_start(row["step"], **row["started"]) for row in starts)
    facts["steps"] = f"{run.last('step') or 0:,} of {int(run.settings.get('schedule.max_steps', 0)):,}"
    facts["tokens"] = f"{run.last('tokens') or 0:,}"
    facts["training time"] = format_duration(run.last("elapsed_s") or 0.0)
    facts["training loss, last"] = _format(run.last("loss"))
    facts["validation loss, last"] = _format(run.last("val_loss"))
    facts["validation loss, best"] = _format(min(run.values("val_loss"), default=None))
    facts["validation loss of EMA, last"] = _format(run.last("val_ema_loss"))
    trained = speed_rows(run.rows)
    if (speed := median_of(trained, "tokens_per_s")) is not None:
        facts["tokens per second, median"] = f"{speed:,.0f}"
    if (share := median_of(trained, "mfu")) is not None:
        facts["MFU, median"] = f"{share:.1%}"
    if peaks := run.values("peak_memory_gib"):
        facts["peak memory of the main rank"] = f"{max(peaks):.2f} GiB"
    facts["skipped steps"] = str(run.last("skipped_steps") or 0)
    facts["batches left out after spikes"] = str(len(run.values("left_out_samples")))
    facts["failed saves"] = str(run.last("failed_saves") or 0)
    if run.settings.get("checkpoint.remote"):
        facts["failed uploads"] = str(run.last("failed_uploads") or 0)
    return {name: fact for name, fact in facts.items() if fact not in ("", "0") or name == "tokens"}


def _format_time(iso: str) -> str:
    return iso[: len("2026-11-26T14:03")].replace("T", " ")


def _describe_data(settings: Mapping[str, str]) -> str:
    path, mixture = (json.loads(settings.get(key, "null")) for key in ("data.path", "data.mixture"))
    return "\n".join(component["path"] for component in mixture) if mixture else path or ""


def _describe_start(step: int, backend: str, world_size: int, device: str, **_: Any) -> str:
    processes = "1 process" if world_size == 1 else f"{world_size} processes"
    return (f"from step {step:,}: " if step else "") + f"{backend}, {processes}, {device}"


def evaluation_table(runs: Sequence[Run]) -> Table:
    """Return a table with all results of all tasks."""
    table = Table([run.label for run in runs])
    for task in dict.fromkeys(task for run in runs for task in run.results):
        results = [run.results.get(task, {}) for run in runs]
        table.rows[f"{task}, at step"] = [
            _format(run.results.get(task, {}).get("step")) + (_OUTDATED if task in run.outdated else "") for run in runs
        ]
        for key in dict.fromkeys(key for result in results for key in result if key not in HEADS):
            cells = [_format(result.get(key)) for result in results]
            if any(cells):
                table.rows[f"{task} {key}"] = cells
    return table


def _format(value: Any) -> str:
    """Format a value as a cell. Objects and null give an empty cell."""
    if isinstance(value, float):
        text = f"{value:.4f}" if 1e-3 <= abs(value) < 1e5 or value == 0 else f"{value:.4g}"
        return text.replace("-", "\N{MINUS SIGN}")
    if isinstance(value, int):
        return f"{value:,}".replace("-", "\N{MINUS SIGN}")
    if isinstance(value, str):
        return value[:16] if re.fullmatch(r"[0-9a-f]{64}", value) else value  # a SHA-256
    if isinstance(value, list) and len(value) == 2 and all(isinstance(end, int | float) for end in value):
        return f"{_format(value[0])} to {_format(value[1])}"
    if isinstance(value, list) and all(isinstance(key, str) for key in value):
        return ", ".join(value)
    return ""


def settings_table(runs: Sequence[Run]) -> Table:
    """Return a table of the settings that differ between the runs, or between a single run and the defaults."""
    columns = {run.label: run.settings for run in runs}
    if len(runs) == 1:
        columns = {"default": dict(flatten(dump_config(Config()))), **columns}
    table = Table(list(columns))
    for key in dict.fromkeys(key for settings in columns.values() for key in settings if key not in NAMING):
        values = [settings.get(key, "") for settings in columns.values()]
        if len(set(values)) > 1:
            table.rows[key] = values
    return table
