"""The console shows each training row with aligned columns, the time of day and the time left."""

from __future__ import annotations

import io
import logging
import re
import time

import pytest

from pipeline.run_folder.sinks.console import Console


def test_training_rows_are_aligned_and_show_the_time_left(caplog: pytest.LogCaptureFixture) -> None:
    console = Console()
    console.start({"schedule": {"max_steps": 100}}, 0)
    with caplog.at_level(logging.INFO):
        for step, loss in ((1, 10.95), (5, 9.5), (10, 8.25)):
            elapsed_s = 30.0 + 2.0 * step  # the first step compiles for 30 seconds
            console.write({"step": step, "loss": 0.0, "mean_loss": loss, "grad_norm": loss, "elapsed_s": elapsed_s})
        console.write({"step": 10, "val_loss": 8.0, "elapsed_s": 60.0})
        console.write({"step": 10, "sample": "Hello,\nwörld"})
        console.rewind(8)
        console.write({"step": 9, "loss": 0.0, "mean_loss": 8.0, "elapsed_s": 70.0})
        console.write({"step": 10, "loss": 0.0, "mean_loss": 8.0, "elapsed_s": 71.0})
    first, second, third, validation, sample, again, last = (record.message for record in caplog.records)
    clock = r"\d\d:\d\d:\d\d"
    assert re.fullmatch(rf"step   1/100 \| loss 10.9500 \| norm 10.950 \| {clock}", first)
    assert re.fullmatch(rf"step   5/100 \| loss  9.5000 \| norm  9.500 \| {clock} \| 3 min 10 s left", second)
    assert third.endswith(" | 3 min 00 s left")
    assert {line.index("norm") for line in (first, second, third)} == {first.index("norm")}
    assert re.fullmatch(rf"step  10/100 \| validation loss 8.0000 \| {clock}", validation)
    assert sample == r'step  10/100 | sample "Hello,\nwörld"'
    assert "left" not in again and last.endswith(" | 1 min 30 s left"), "after a rollback, the estimate starts again"


def test_the_line_of_a_large_run_fits_into_100_columns(caplog: pytest.LogCaptureFixture) -> None:
    console = Console()
    console.start({"schedule": {"max_steps": 190_735}}, 0)
    figures = {"lr": 6e-4, "grad_norm": 12.345, "tokens_per_s": 1.5e6, "mfu": 0.45, "step_ms": 333.0}
    with caplog.at_level(logging.INFO):
        for step in (100_000, 100_001):
            console.write({"step": step, "loss": 0.0, "mean_loss": 10.95, **figures, "elapsed_s": step / 3})
        losses = {"val_loss": 3.05, "val_perplexity": 21.12, "val_ema_loss": 3.05}
        console.write({"step": 100_001, "elapsed_s": 33333.4, **losses})
    assert " left" in caplog.messages[1]
    assert max(map(len, caplog.messages)) <= 100


class Terminal(io.StringIO):
    """Collects what a program writes to its terminal."""

    def isatty(self) -> bool:
        return True


def test_a_terminal_shows_a_progress_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    console = Console()
    console.start({"schedule": {"max_steps": 40}}, 8)
    assert "8/40" in shown(terminal)
    console.count_step(9)
    console.write({"step": 9, "loss": 0.0, "mean_loss": 3.25})
    assert "9/40" in shown(terminal) and "loss 3.2500" in shown(terminal)
    console.rewind(8)
    assert "8/40" in shown(terminal)
    time.sleep(0.11)  # tqdm draws the bar at most every 0.1 s
    console.count_step(9)
    assert "9/40" in shown(terminal), "the bar moves again right after the step to which the run went back"
    console.end({})
    assert shown(terminal).strip() == "", "the bar does not stay on the terminal"


def shown(terminal: Terminal) -> str:
    """Return what the last line of the terminal shows."""
    return re.split(r"[\r\n]", terminal.getvalue())[-1]


def test_there_is_no_progress_bar_in_a_file(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console()
    console.start({"schedule": {"max_steps": 40}}, 0)
    console.count_step(1)
    console.end({})
    assert capsys.readouterr().err == ""
