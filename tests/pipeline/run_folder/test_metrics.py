"""Rows are shown on the console, and damaged lines of ``metrics.jsonl`` are dropped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from data_tools.formatting import format_duration
from pipeline.run_folder.metrics import describe_speed, format_row, read_metrics, speed_rows


class TestConsole:
    def test_a_training_row_shows_the_mean_loss(self) -> None:
        line = format_row(
            {
                "step": 7,
                "loss": 9.0,
                "mean_loss": 5.12345,
                "lr": 6e-4,
                "grad_norm": 1.2345,
                "tokens_per_s": 12345.6,
                "mfu": 0.4567,
            },
            200,
        )
        assert line == "step   7/200 | loss  5.1235 | norm  1.234 |  12,346 tokens/s"

    def test_a_validation_row(self) -> None:
        line = format_row({"step": 200, "val_loss": 3.0, "val_perplexity": 20.0855}, 200)
        assert line == "step 200/200 | validation loss 3.0000 | perplexity 20.09"


def test_the_console_says_that_a_loss_is_null() -> None:
    assert format_row({"step": 3, "mean_loss": None, "grad_norm": 1.5}, 10) == "step  3/10 | loss null | norm  1.500"
    assert format_row({"step": 3, "val_loss": None, "val_perplexity": None}, 10) == "step  3/10 | validation loss null"


def test_the_speed_is_the_median_of_the_training_rows() -> None:
    rows = [
        {"step": step, "tokens_per_s": speed, "step_ms": 1e6 / speed, "mfu": speed / 1e4, "peak_memory_gib": step / 8}
        for step, speed in ((1, 100.0), (2, 1250.0), (3, 1300.0))
    ]
    said = "median 1,250 tokens/s, 800 ms per step, 12.5% of the ceiling; peak memory 0.38 GiB"
    assert describe_speed([*rows, {"step": 3, "val_loss": 2.0}]) == said
    assert describe_speed([{"step": 0, "val_loss": 2.0}]) == ""


def test_a_run_without_mfu_has_a_speed() -> None:
    rows = [{"step": 1, "tokens_per_s": 500.0, "step_ms": 20.0, "mfu": None, "peak_memory_gib": 1.0}]
    assert describe_speed(rows) == "median 500 tokens/s, 20 ms per step; peak memory 1.00 GiB"


def test_the_first_row_of_each_start_does_not_count_in_the_speed() -> None:
    """It includes the time to compile."""

    def trained(step: int, tokens_per_s: float) -> dict[str, Any]:
        return {"step": step, "tokens_per_s": tokens_per_s}

    begun, resumed = {"step": 0, "started": {}}, {"step": 20, "started": {}}
    rows = [begun, {"step": 0, "val_loss": 9.0}, trained(1, 50.0), trained(10, 1000.0), trained(20, 1100.0)]
    assert speed_rows(rows) == rows[-2:]
    assert speed_rows([*rows, resumed, trained(30, 60.0), trained(40, 900.0)]) == [*rows[-2:], trained(40, 900.0)]
    assert speed_rows(rows[:3]) == rows[2:3], "a run of one row has no other speed"


@pytest.mark.parametrize(
    ("seconds", "said"), [(12.34, "12.3 s"), (449.6, "7 min 30 s"), (3600 * 3 + 440, "3 h 07 min")]
)
def test_durations(seconds: float, said: str) -> None:
    assert format_duration(seconds) == said


@pytest.mark.parametrize(
    "line",
    ["5", "[]", "null", '{"loss": 1}', '{"step": "1"}', '{"step": 1, "loss": "x"}', '{"step": 1, "elapsed_s": []}'],
)
def test_a_damaged_line_is_dropped(line: str, tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1, "loss": null}\n\xff\n' + line.encode() + b"\n")
    assert read_metrics(tmp_path) == [{"step": 1, "loss": None}]
