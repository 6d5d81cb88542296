"""Results are shown as a table, and set aside if the run goes back."""

from __future__ import annotations

import os
from pathlib import Path

from pipeline.evaluation.results import format_table, set_aside_results

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
        ["loss", "by", "position", "in", "the", "window"],
        ["0", "8.0000"],
        ["1", "6.0000"],
        ["2-3", "4.5000"],
        ["4-6", "3.0000"],
    ]


def test_figures_are_aligned() -> None:
    lines = [line for line in format_table({"validation": RESULT}).splitlines() if line[-1].isdigit()]
    assert len(lines) == 6 and len({len(line) for line in lines}) == 1


def test_a_long_name_moves_the_column() -> None:
    result = {"step": 7, "checkpoint": "here", "loss": 3.25, "empty_texts_left_out": 0}
    _, first, second = format_table({"texts": result}).splitlines()
    assert len(first) == len(second)


def test_results_of_later_steps_are_set_aside(tmp_path: Path) -> None:
    folder = tmp_path / "evaluation"
    folder.mkdir()
    for name, text in (("a", '{"step": 7}'), ("b", '{"step": 8}'), ("c", '{"step": 9'), ("d", '{"step": "late"}')):
        (folder / f"{name}.json").write_text(text)
    set_aside_results(tmp_path, 7)
    assert sorted(os.listdir(folder)) == ["a.json", "b.json.abandoned", "c.json", "d.json"]
