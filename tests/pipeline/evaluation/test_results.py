"""Results are found again in the run folder, and shown as a table."""

from __future__ import annotations

import json
import os
from pathlib import Path

from pipeline.evaluation.results import find_results, format_table

RESULT = {
    "task": "validation",
    "checkpoint": "runs/x/checkpoints/step_00000007",
    "step": 7,
    "loss": 3.25,
    "target_tokens": 1234567,
    "loss_by_position": [8.0, 6.0, 5.0, 4.0, 3.0, 3.0, None],
}


def test_the_table_has_one_line_per_figure() -> None:
    assert [line.split() for line in format_table({"validation": RESULT}).splitlines()] == [
        ["validation", "(step", "7,", "runs/x/checkpoints/step_00000007)"],
        ["loss", "3.2500"],
        ["target_tokens", "1,234,567"],
        ["loss", "at", "0", "8.0000"],
        ["loss", "at", "1", "6.0000"],
        ["loss", "at", "2-3", "4.5000"],
        ["loss", "at", "4-6", "3.0000"],
    ]


def test_figures_are_aligned() -> None:
    _, *lines = format_table({"validation": RESULT}).splitlines()
    assert len({len(line) for line in lines}) == 1


def test_results_of_a_step_are_found(tmp_path: Path) -> None:
    assert find_results(tmp_path, ["validation"], 7) is None
    (tmp_path / "evaluation").mkdir()
    (tmp_path / "evaluation" / "validation.json").write_text(json.dumps(RESULT))
    assert find_results(tmp_path, ["validation"], 7) == {"validation": RESULT}
    assert find_results(tmp_path, ["validation"], 8) is None
    assert find_results(tmp_path, ["validation", "other"], 7) is None


def test_damaged_results_and_results_of_other_data_are_not_found(tmp_path: Path) -> None:
    path = tmp_path / "evaluation" / "validation.json"
    path.parent.mkdir()
    path.write_text(json.dumps({**RESULT, "data": "data/mine"}))
    for data_of_run, is_found in (("data/mine", True), (os.path.abspath("data/mine"), True), ("data/other", False)):
        found = find_results(tmp_path, ["validation"], 7, {"validation": data_of_run})
        assert (found is not None) == is_found
    for damaged in ("", '{"step": 7', "[7]"):
        path.write_text(damaged)
        assert find_results(tmp_path, ["validation"], 7) is None
