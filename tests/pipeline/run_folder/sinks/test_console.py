"""The console shows each training row with aligned columns, the time of day and the time left."""

from __future__ import annotations

import logging
import re

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
        console.write({"step": 10, "sample": "not on the console"})
        console.rewind(8)
        console.write({"step": 9, "loss": 0.0, "mean_loss": 8.0, "elapsed_s": 70.0})
        console.write({"step": 10, "loss": 0.0, "mean_loss": 8.0, "elapsed_s": 71.0})
    first, second, third, validation, again, last = (record.message for record in caplog.records)
    clock = r"\d\d:\d\d:\d\d"
    assert re.fullmatch(rf"step   1/100 \| loss 10.9500 \| norm 10.950 \| {clock}", first)
    assert re.fullmatch(rf"step   5/100 \| loss  9.5000 \| norm  9.500 \| {clock} \| 3 min 10 s left", second)
    assert third.endswith(" | 3 min 00 s left")
    assert {line.index("norm") for line in (first, second, third)} == {first.index("norm")}
    assert re.fullmatch(rf"step  10/100 \| validation loss 8.0000 \| {clock}", validation)
    assert "left" not in again and last.endswith(" | 1 min 30 s left"), "after a rollback, the estimate starts again"
