"""What a run logged can be read back, without gaps and without steps that are there twice."""

from __future__ import annotations

import json
import logging
import re
import time
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
from tensorboard.summary.writer import event_file_writer

from pipeline.run_folder.layout import METRICS_FILE, TENSORBOARD_FOLDER
from pipeline.run_folder.metrics import TENSORBOARD_TAGS, MetricsLog, format_row, read_metrics
from tests.pipeline.conftest import largest_file

GROUPS = {"train", "validation", "optimizer", "throughput", "memory", "guard", "checkpoint"}


@pytest.fixture(autouse=True)
def first_files_of_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Event files of one second are read in the order of a number in their names, as text: 10 comes before 9."""
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(0))


def row(step: int, **more: float) -> dict[str, Any]:
    return {"step": step, "loss": 10.0 - step, "lr": step / 1000, **more}


def log_steps(folder: Path, steps: range, *, resumed_step: int = 0, tensorboard: bool = False, **more: float) -> None:
    metrics = MetricsLog(folder, resumed_step=resumed_step, tensorboard=tensorboard)
    for step in steps:
        metrics.write(row(step, **more))
    metrics.close()


def events(folder: Path) -> EventAccumulator:
    accumulator = EventAccumulator(str(folder / TENSORBOARD_FOLDER), size_guidance={"scalars": 0})
    accumulator.Reload()
    return accumulator


class TestRows:
    def test_rows_come_back(self, tmp_path: Path) -> None:
        log_steps(tmp_path / "new" / "run", range(1, 4), tokens_per_s=1.5)
        assert read_metrics(tmp_path / "new" / "run") == [row(step, tokens_per_s=1.5) for step in (1, 2, 3)]

    def test_a_row_is_on_the_disk_at_once(self, tmp_path: Path) -> None:
        metrics = MetricsLog(tmp_path, resumed_step=0, tensorboard=False)
        metrics.write(row(1))
        assert read_metrics(tmp_path) == [row(1)]
        metrics.close()

    def test_resume_drops_later_rows(self, tmp_path: Path) -> None:
        log_steps(tmp_path, range(1, 8), first=1.0)
        log_steps(tmp_path, range(5, 10), resumed_step=4, second=1.0)
        rows = read_metrics(tmp_path)
        assert [r["step"] for r in rows] == list(range(1, 10))
        assert [r["step"] for r in rows if "second" in r] == list(range(5, 10))

    def test_a_run_from_scratch_drops_all_rows(self, tmp_path: Path) -> None:
        log_steps(tmp_path, range(8))
        log_steps(tmp_path, range(2))
        assert [r["step"] for r in read_metrics(tmp_path)] == [0, 1]

    @pytest.mark.parametrize("resumed_step", [3, 2])
    def test_a_line_that_a_crash_cut_costs_no_other(self, tmp_path: Path, resumed_step: int) -> None:
        log_steps(tmp_path, range(1, 5))
        path = tmp_path / METRICS_FILE
        path.write_bytes(path.read_bytes()[:-9])  # in the middle of step 4
        assert [r["step"] for r in read_metrics(tmp_path)] == [1, 2, 3]
        log_steps(tmp_path, range(resumed_step + 1, 6), resumed_step=resumed_step)
        assert read_metrics(tmp_path) == [row(step) for step in range(1, 6)]

    def test_a_run_that_never_logged_has_no_rows(self, tmp_path: Path) -> None:
        assert read_metrics(tmp_path) == []


def test_going_back_drops_the_rows_after_it(tmp_path: Path) -> None:
    metrics = MetricsLog(tmp_path, resumed_step=0, tensorboard=True)
    for step in (1, 2, 3, 4):
        metrics.write(row(step))
    metrics.rewind(2)
    for step in (3, 4):
        metrics.write({**row(step), "again": True})
    metrics.close()
    assert [(written["step"], "again" in written) for written in read_metrics(tmp_path)] == [
        (1, False),
        (2, False),
        (3, True),
        (4, True),
    ]


class TestFullDisk:
    LINE_BYTES = len(json.dumps(row(1))) + 1

    @pytest.mark.parametrize("room_bytes", [0, 1, 17, LINE_BYTES - 1, LINE_BYTES, LINE_BYTES + 1])
    def test_rows_wait_and_come_in_order_and_whole(
        self, tmp_path: Path, room_bytes: int, caplog: pytest.LogCaptureFixture
    ) -> None:
        metrics = MetricsLog(tmp_path, resumed_step=0, tensorboard=False)
        metrics.write(row(1))
        with caplog.at_level(logging.WARNING), largest_file(self.LINE_BYTES + room_bytes):
            for step in (2, 3, 4):
                metrics.write(row(step))
            written = 1 + room_bytes // self.LINE_BYTES
            assert (tmp_path / METRICS_FILE).read_bytes().endswith(b"}\n"), "half a line would swallow the next"
            assert read_metrics(tmp_path) == [row(step) for step in range(1, written + 1)]
        assert caplog.text.count("cannot write metrics (File too large)") == 1, "once is enough"
        metrics.write(row(5))
        assert read_metrics(tmp_path) == [row(step) for step in range(1, 6)]
        metrics.close()

    def test_going_back_while_the_disk_is_full(self, tmp_path: Path) -> None:
        metrics = MetricsLog(tmp_path, resumed_step=0, tensorboard=False)
        for step in (1, 2):
            metrics.write(row(step))
        with largest_file(self.LINE_BYTES // 2):
            for step in (3, 4):
                metrics.write(row(step))
            metrics.rewind(3)
            metrics.write(row(4))
            assert read_metrics(tmp_path) == [row(1), row(2)]
        metrics.write(row(5))
        metrics.close()
        assert read_metrics(tmp_path) == [row(step) for step in range(1, 6)]

    def test_a_second_time_is_told_again(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        metrics = MetricsLog(tmp_path, resumed_step=0, tensorboard=False)
        with caplog.at_level(logging.WARNING):
            for step in (1, 3):
                with largest_file((step - 1) * self.LINE_BYTES):
                    metrics.write(row(step))
                metrics.write(row(step + 1))
        assert caplog.text.count("cannot write metrics") == 2
        assert read_metrics(tmp_path) == [row(step) for step in (1, 2, 3, 4)]
        metrics.close()

    def test_rows_that_never_found_room_are_told_of_at_the_end(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        metrics = MetricsLog(tmp_path, resumed_step=0, tensorboard=False)
        metrics.write(row(1))
        with caplog.at_level(logging.WARNING), largest_file(self.LINE_BYTES):
            for step in (2, 3):
                metrics.write(row(step))
            metrics.close()
        assert "2 rows of metrics could not be written" in caplog.text
        assert read_metrics(tmp_path) == [row(1)]

    @pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
    def test_tensorboard_goes_on_once_there_is_room(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        """Its own thread ends with the first error; what it had not written is lost there, and only there."""
        metrics = MetricsLog(tmp_path, resumed_step=0, tensorboard=True)
        steps = iter(range(1, 10_000))
        with caplog.at_level(logging.WARNING), largest_file(1000):
            until = time.monotonic() + 30
            while "cannot write TensorBoard events" not in caplog.text and time.monotonic() < until:
                metrics.write({"step": next(steps), "loss": 1.0})
                (tmp_path / METRICS_FILE).write_bytes(b"")  # room for rows, so that they reach TensorBoard
            assert "cannot write TensorBoard events (File too large)" in caplog.text
        last = next(steps)
        metrics.write(row(last))
        metrics.close()
        assert read_metrics(tmp_path) == [row(last)]
        assert [s.step for s in events(tmp_path).Scalars("train/loss")][-1] == last


class TestTensorBoard:
    def test_tags_are_grouped(self, tmp_path: Path) -> None:
        everything = {key: float(i) for i, key in enumerate(TENSORBOARD_TAGS)}
        metrics = MetricsLog(tmp_path, resumed_step=0, tensorboard=True)
        metrics.write({**everything, "step": 1})
        metrics.close()
        drawn = events(tmp_path)
        tags = drawn.Tags()["scalars"]
        assert sorted(tags) == sorted(TENSORBOARD_TAGS.values())
        for key, tag in TENSORBOARD_TAGS.items():
            assert [(s.step, s.value) for s in drawn.Scalars(tag)] == [(1, everything[key])], tag
        assert {tag.split("/")[0] for tag in tags} == GROUPS

    def test_the_losses_on_parts_of_a_mixture_stand_beside_their_mean(self, tmp_path: Path) -> None:
        metrics = MetricsLog(tmp_path, resumed_step=0, tensorboard=True)
        metrics.write({"step": 3, "val_loss": 2.0, "val_loss_wiki": 1.0, "val_loss_code.v2": 3.0})
        metrics.close()
        drawn = events(tmp_path)
        tags = ["validation/loss", "validation/loss_wiki", "validation/loss_code.v2"]
        assert {tag: drawn.Scalars(tag)[0].value for tag in tags} == dict(zip(tags, (2.0, 1.0, 3.0), strict=True))

    def test_values_are_those_of_the_rows(self, tmp_path: Path) -> None:
        log_steps(tmp_path, range(1, 6), tensorboard=True)
        scalars = events(tmp_path).Scalars("train/loss")
        assert [(s.step, s.value) for s in scalars] == [(step, 10.0 - step) for step in range(1, 6)]

    def test_what_a_row_lacks_is_not_drawn(self, tmp_path: Path) -> None:
        metrics = MetricsLog(tmp_path, resumed_step=0, tensorboard=True)
        metrics.write({"step": 1, "val_loss": 2.0, "loss": None})
        metrics.close()
        assert events(tmp_path).Tags()["scalars"] == ["validation/loss"]

    @pytest.mark.parametrize(("resumed_step", "expected"), [(4, range(1, 8)), (0, range(5, 8))])
    def test_no_step_is_there_twice(self, tmp_path: Path, resumed_step: int, expected: range) -> None:
        """After a resume, and after a fresh start over an old run."""
        log_steps(tmp_path, range(1, 7), tensorboard=True)
        log_steps(tmp_path, range(5, 8), resumed_step=resumed_step, tensorboard=True)
        assert [s.step for s in events(tmp_path).Scalars("train/loss")] == list(expected)

    def test_hyperparameters_and_results(self, tmp_path: Path) -> None:
        metrics = MetricsLog(tmp_path, resumed_step=0, tensorboard=True)
        metrics.write(row(1))
        config = {
            "run": {"name": "x", "compile": False},
            "optimizer": {"betas": [0.9, 0.95]},
            "data": {"seq_len": None},
            "logging": {"every_steps": 7},
        }
        metrics.write_hyperparameters(config, {"final/loss": 3.25})
        metrics.close()
        accumulator = events(tmp_path)
        settings = accumulator.summary_metadata["_hparams_/session_start_info"].plugin_data.content
        for text in (b"run.name", b"optimizer.betas", b"[0.9, 0.95]", b"data.seq_len"):
            assert text in settings
        assert b"logging" not in settings, "it decides nothing"
        assert [s.value for s in accumulator.Scalars("final/loss")] == [3.25]

    def test_training_and_validation_share_a_custom_chart(self, tmp_path: Path) -> None:
        log_steps(tmp_path, range(1, 3), tensorboard=True)
        (event,) = events(tmp_path).Tensors("custom_scalars__config__")
        layout = Layout.FromString(event.tensor_proto.string_val[0])
        charts = {chart.title: list(chart.multiline.tag) for category in layout.category for chart in category.chart}
        assert charts["training and validation"] == ["^train/loss$", "^validation/loss$"]
        patterns = [re.compile(pattern) for of_chart in charts.values() for pattern in of_chart]
        assert all(any(pattern.match(tag) for tag in TENSORBOARD_TAGS.values()) for pattern in patterns)

    def test_without_tensorboard_there_are_no_event_files(self, tmp_path: Path) -> None:
        metrics = MetricsLog(tmp_path, resumed_step=0, tensorboard=False)
        metrics.write(row(1))
        metrics.write_hyperparameters({"run": {"name": "x"}}, {"final/loss": 1.0})
        metrics.close()
        assert [path.name for path in tmp_path.iterdir()] == [METRICS_FILE]


class TestConsole:
    def test_a_training_row(self) -> None:
        line = format_row(
            {"step": 7, "loss": 5.12345, "lr": 6e-4, "grad_norm": 1.2345, "tokens_per_s": 12345.6, "mfu": 0.4567}, 200
        )
        assert line == "step   7/200 | loss 5.1235 | lr 6.00e-04 | norm 1.234 | 12,346 tokens/s | MFU 45.7%"

    def test_a_validation_row(self) -> None:
        line = format_row({"step": 200, "val_loss": 3.0, "val_perplexity": 20.0855}, 200)
        assert line == "step 200/200 | validation loss 3.0000 | perplexity 20.09"
