"""The table and the chart of a ladder, from the metrics of its runs."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from pipeline.report.ladder import Branch, write_ladder


def write_metrics(folder: Path, losses: dict[int, float]) -> Path:
    folder.mkdir()
    rows = [{"step": step, "tokens": 100 * step, "val_loss": loss} for step, loss in losses.items()]
    rows += [{"step": step, "loss": 9.0} for step in losses]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_each_branch_has_its_losses_and_tokens(tmp_path: Path) -> None:
    stable = write_metrics(tmp_path / "stable", {0: 6.0, 40: 5.0, 80: 4.5})
    branches = [Branch(40, 50, tmp_path / "decay-from-40"), Branch(60, 75, tmp_path / "decay-from-60")]
    write_metrics(branches[0].run, {50: 4.25})
    write_metrics(branches[1].run, {70: 4.1, 75: 4.0})
    table, files = write_ladder(tmp_path, stable, branches)
    assert table.splitlines()[2:] == [
        f"| 40 | 50 | 5,000 | 5.0000 | 4.2500 | `{tmp_path / 'decay-from-40'}` |",
        f"| 60 | 75 | 7,500 |  | 4.0000 | `{tmp_path / 'decay-from-60'}` |",
    ]
    assert [file.name for file in files] == ["ladder.md", "ladder.json", "ladder.png"]
    assert files[0].read_text() == table
    rungs = json.loads(files[1].read_text())
    assert [(rung["milestone"], rung["steps"], rung["stable_loss"], rung["loss"]) for rung in rungs] == [
        (40, 50, 5.0, 4.25),
        (60, 75, None, 4.0),
    ]
    assert files[2].read_bytes().startswith(b"\x89PNG")


def test_without_a_validation_split_there_is_no_chart(tmp_path: Path) -> None:
    stable = write_metrics(tmp_path / "stable", {})
    branch = Branch(40, 50, write_metrics(tmp_path / "decay-from-40", {}))
    table, files = write_ladder(tmp_path, stable, [branch])
    assert table.splitlines()[2].startswith("| 40 | 50 |  |  |  |")
    assert [file.name for file in files] == ["ladder.md", "ladder.json"]


def test_without_matplotlib_there_is_no_chart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pipeline.report.drawing", None)
    stable = write_metrics(tmp_path / "stable", {40: 5.0})
    branch = Branch(40, 50, write_metrics(tmp_path / "decay-from-40", {50: 4.25}))
    assert [file.suffix for file in write_ladder(tmp_path, stable, [branch])[1]] == [".md", ".json"]
