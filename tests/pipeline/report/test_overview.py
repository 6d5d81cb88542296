"""The table of runs shows the state, the progress and the last checkpoint of each run."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import ReportError
from pipeline.report.overview import format_table, summarize_run, summarize_runs
from pipeline.run_folder.lock import lock_run_folder

STARTED = {"step": 0, "started": {}}


def make_run(folder: Path, *rows: dict[str, Any], max_steps: int = 10, checkpoints: tuple[int, ...] = ()) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"schedule": {"max_steps": max_steps}}))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for step in checkpoints:
        (folder / "checkpoints" / f"step_{step:08d}").mkdir(parents=True)
    return folder


@pytest.mark.parametrize(
    ("rows", "state"),
    [
        ([STARTED, {"step": 5, "loss": 1.0}], "failed"),
        ([STARTED, {"step": 10, "loss": 1.0}], "finished"),
        ([STARTED, {"step": 5, "ended": "interrupted"}], "interrupted"),
        ([STARTED, {"step": 5, "ended": "failed"}], "failed"),
        ([STARTED, {"step": 5, "ended": "interrupted"}, STARTED, {"step": 6, "loss": 1.0}], "failed"),
        ([STARTED, {"step": 7, "ended": "finished"}], "finished"),
        ([], "failed"),
    ],
)
def test_the_state_comes_from_the_last_start_or_end(rows: list[dict[str, Any]], state: str, tmp_path: Path) -> None:
    assert summarize_run(make_run(tmp_path / "run", *rows)).state == state


def test_a_run_is_running_while_its_process_holds_the_lock(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", STARTED)
    with lock_run_folder(folder):
        assert summarize_run(folder).state == "running", "an older version wrote no heartbeat"
        (folder / "heartbeat.json").write_text("{}")
        assert summarize_run(folder).state == "running"
        os.utime(folder / "heartbeat.json", (1e9, 1e9))
        assert summarize_run(folder).state == "stale"
    (folder / "run.lock").write_text(json.dumps({"host": os.uname().nodename, "pid": 2**22 + 1}))
    assert summarize_run(folder).state == "failed", "the process was killed"


def test_the_last_values_are_shown(tmp_path: Path) -> None:
    rows = [
        {"step": 0, "val_loss": 5.0},
        {"step": 1, "loss": 4.0, "tokens_per_s": 1500.0},
        {"step": 2, "loss": 3.25, "tokens_per_s": 1600.0},
        {"step": 3, "loss": None},
    ]
    run = summarize_run(make_run(tmp_path / "run", *rows, checkpoints=(2, 1)))
    assert (run.step, run.max_steps, run.loss, run.val_loss, run.tokens_per_s) == (3, 10, 3.25, 5.0, 1600.0)
    assert run.last_checkpoint_step == 2 and run.last_checkpoint == str(tmp_path / "run/checkpoints/step_00000002")
    assert run.size_bytes == sum(path.stat().st_size for path in (tmp_path / "run").rglob("*") if path.is_file())


def test_runs_are_listed_newest_first_with_aligned_columns(tmp_path: Path) -> None:
    for age_s, name in ((7200, "old"), (60, "group/new"), (90000, "old\nest")):
        file = make_run(tmp_path / name, STARTED) / "metrics.jsonl"
        written = file.stat().st_mtime - age_s
        os.utime(file, (written, written))
    lines = format_table(summarize_runs(tmp_path)).splitlines()
    names = [line.split()[0].removeprefix(f"{tmp_path}/") for line in lines[1:]]
    assert names == ["group/new", "old", r"old\nest"]
    assert len({line.index("failed") for line in lines[1:]}) == 1
    assert "2 h" in lines[2] and "1 d" in lines[3]


def test_runs_without_metrics_are_listed_with_their_state(tmp_path: Path) -> None:
    """An average of checkpoints, an import, and a run that ended before its first row."""
    counts = dict.fromkeys(("samples", "tokens", "updates", "loss_scale_good_steps", "seed"), 0)
    for name, averaged_steps in (("averaged", [5, 10]), ("imported", [])):
        folder = make_run(tmp_path / name, max_steps=20, checkpoints=(10,))
        (folder / "metrics.jsonl").unlink()
        state = {"step": 10, **counts, "loss_scale": None, "world_size": 1, "versions": {}, "config": {}}
        file = folder / "checkpoints" / "step_00000010" / "state.json"
        file.write_text(json.dumps({**state, "averaged_steps": averaged_steps}))
    (make_run(tmp_path / "broken") / "metrics.jsonl").unlink()
    (tmp_path / "exported").mkdir()
    (tmp_path / "exported" / "config.json").write_text('{"model_type": "gpt2"}')
    runs = {Path(run.folder).name: run for run in summarize_runs(tmp_path)}
    assert {name: run.state for name, run in runs.items()} == {
        "averaged": "averaged",
        "imported": "not started",
        "broken": "failed",
    }
    assert (runs["averaged"].step, runs["averaged"].max_steps, runs["averaged"].last_checkpoint_step) == (10, 20, 10)
    (tmp_path / "averaged" / "metrics.jsonl").write_text('{"step": 20, "ended": "finished"}\n')
    assert summarize_run(tmp_path / "averaged").state == "finished", "it has trained further"


def test_a_folder_without_runs_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ReportError, match="no run here"):
        summarize_runs(tmp_path)
