"""What the runs were and what they reached, as tables: a row a fact, a column a run."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from pipeline.config.loading import dump_config
from pipeline.config.schema import Config
from pipeline.report.runs import Run, differing_settings, flattened

#: Settings that name a run and say nothing about it.
NAMING = ("run.name", "run.out_dir")
#: Settings that the summary shows of every run.
SHOWN = ("model.preset", "run.precision", "run.compile", "batch.tokens_per_step", "optimizer.learning_rate")
#: Keys of a result that are no measurement.
HEADS = ("task", "step", "checkpoint")


@dataclass(frozen=True)
class Table:
    """Cells of text."""

    columns: list[str]
    rows: dict[str, list[str]] = field(default_factory=dict)


def summary_table(runs: Sequence[Run]) -> Table:
    """What each run is and how far it has come."""
    facts = [_facts(run) for run in runs]
    names = dict.fromkeys(name for of_run in facts for name in of_run)
    return Table([run.label for run in runs], {name: [of_run.get(name, "") for of_run in facts] for name in names})


def _facts(run: Run) -> dict[str, str]:
    facts = {key: run.settings[key].strip('"') for key in SHOWN if key in run.settings}
    if run.starts:
        facts["parameters"] = f"{run.starts[-1]['started']['parameters']:,}"
    facts["computed on"] = "\n".join(_start(row) for row in run.starts)
    facts["steps"] = f"{run.last('step') or 0:,} of {int(run.settings.get('schedule.max_steps', 0)):,}"
    facts["tokens"] = f"{run.last('tokens') or 0:,}"
    facts["training time"] = duration(run.last("elapsed_s") or 0.0)
    facts["training loss, last"] = _number(run.last("loss"))
    facts["validation loss, last"] = _number(run.last("val_loss"))
    facts["validation loss, best"] = _number(min(run.values("val_loss"), default=None))
    facts["tokens per second, median"] = _median(run, "tokens_per_s", "{:,.0f}")
    facts["MFU, median"] = _median(run, "mfu", "{:.1%}")
    facts["peak memory of the main rank"] = _largest(run, "peak_memory_gib", "{:.2f} GiB")
    facts["skipped steps"] = str(run.last("skipped_steps") or 0)
    facts["batches left out after spikes"] = str(len(run.values("left_out_samples")))
    facts["failed saves"] = str(run.last("failed_saves") or 0)
    return {name: fact for name, fact in facts.items() if fact not in ("", "0") or name == "tokens"}


def _start(row: dict[str, Any]) -> str:
    started = row["started"]
    processes = "1 process" if started["world_size"] == 1 else f"{started['world_size']} processes"
    since = f"from step {row['step']:,}: " if row["step"] else ""
    return f"{since}{started['backend']}, {processes}, {started['device']}"


def duration(seconds: float) -> str:
    """Seconds as a person says them: ``3 h 07 min``, ``7 min 30 s``, ``12.5 s``."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02} s"
    return f"{minutes // 60:,} h {minutes % 60:02} min"


def _median(run: Run, key: str, pattern: str) -> str:
    values = run.values(key)
    return pattern.format(statistics.median(values)) if values else ""


def _largest(run: Run, key: str, pattern: str) -> str:
    values = run.values(key)
    return pattern.format(max(values)) if values else ""


def _number(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4f}" if 1e-3 <= abs(value) < 1e5 or value == 0 else f"{value:.4g}"
    return "" if value is None else f"{value:,}" if isinstance(value, int) else str(value)


def evaluation_table(runs: Sequence[Run]) -> Table:
    """All numbers of all tasks, with what they were measured on and how."""
    table = Table([run.label for run in runs])
    tasks = dict.fromkeys(task for run in runs for task in run.results)
    for task in tasks:
        results = [run.results.get(task, {}) for run in runs]
        table.rows[f"{task}, at step"] = [_number(result.get("step")) for result in results]
        for key in dict.fromkeys(key for result in results for key in result if key not in HEADS):
            cells = [_measured(result.get(key)) for result in results]
            if any(cells):
                table.rows[f"{task} {key}"] = cells
    return table


def _measured(value: Any) -> str:
    """A number, an interval of two, or a short text; longer structures are left to the JSON file."""
    if isinstance(value, list) and len(value) == 2 and all(isinstance(end, int | float) for end in value):
        return f"{_number(value[0])} to {_number(value[1])}"
    if isinstance(value, list | dict | None):
        return ""
    return value[:16] if isinstance(value, str) and _is_sha256(value) else _number(value)


def _is_sha256(text: str) -> bool:
    return len(text) == 64 and set(text) <= set("0123456789abcdef")


def settings_table(runs: Sequence[Run]) -> Table:
    """Of several runs the settings that differ, of one run those that are not the default."""
    columns = {run.label: run.settings for run in runs}
    if len(runs) == 1:
        columns = {"default": dict(flattened(dump_config(Config()))), **columns}
    differing = differing_settings(list(columns.values()))
    return Table(list(columns), {key: values for key, values in differing.items() if key not in NAMING})
