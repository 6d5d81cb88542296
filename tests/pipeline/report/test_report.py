"""The report shows what the run folders hold, in any state, and browsers show the report."""

from __future__ import annotations

import json
import math
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from data_tools.errors import DataError
from pipeline.checkpoint.layout import list_checkpoints
from pipeline.checkpoint.manifest import read_manifest
from pipeline.config.loading import dump_config
from pipeline.config.schema import Config
from pipeline.errors import ReportError
from pipeline.report.curves import MOST_POINTS, STEPS, Chart, Curve, charts_of, thin_out
from pipeline.report.drawing import draw, log_ticks
from pipeline.report.page import PAGE_FILE, write_report
from pipeline.report.runs import read_runs
from pipeline.report.tables import evaluation_table, settings_table, summary_table
from pipeline.training.run_record import RunRecord
from tests.pipeline.conftest import tiny_config
from tests.support.browser import DESKTOP, PHONE, look_at, needs_browser
from tests.support.runs import REPOSITORY

CHARTS = {
    "loss_by_steps",
    "loss_by_tokens",
    "loss_by_time",
    "learning_rate",
    "grad_norm",
    "tokens_per_s",
    "mfu",
    "peak_memory",
}


def training_row(step: int, **more: Any) -> dict[str, Any]:
    return {
        "step": step,
        "loss": 3 + 8 * math.exp(-step / 20),
        "lr": 1e-3,
        "grad_norm": 1 + 1 / step,
        "tokens": step * 2048,
        "tokens_per_s": 1000.0,
        "mfu": 0.5,
        "peak_memory_gib": 1.25,
        "skipped_steps": 0,
        "elapsed_s": step * 2.0,
        **more,
    }


def start_row(step: int, backend: str, world_size: int) -> dict[str, Any]:
    started = {"backend": backend, "world_size": world_size, "device": "cpu (x86_64)", "parameters": 7_200_000}
    return {"step": step, "started": started, "elapsed_s": 0.0}


def make_run(folder: Path, rows: list[dict[str, Any]], settings: dict[str, dict[str, Any]] | None = None) -> Path:
    folder.mkdir(parents=True)
    config = dump_config(Config())
    for section, keys in (settings or {}).items():
        config[section] |= keys
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def ordinary_rows(steps: int = 60) -> list[dict[str, Any]]:
    rows = [start_row(0, "DDP with fused AdamW", 1), {"step": 0, "tokens": 0, "val_loss": 10.9, "elapsed_s": 1.0}]
    for step in range(1, steps + 1):
        rows.append(training_row(step))
        if step % 20 == 0:
            rows.append({"step": step, "tokens": step * 2048, "val_loss": 4.0 - step / 100, "elapsed_s": step * 2.0})
    return rows


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_run(tmp_path / "runs" / "one", ordinary_rows(), {"backend": {"name": "ddp"}})


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Write the page of two runs. The second changed its backend and was evaluated."""
    folder = tmp_path_factory.mktemp("report")
    first = make_run(folder / "ddp", ordinary_rows())
    moved = [*ordinary_rows(30), start_row(30, "FSDP2 with AdamW", 4), *(training_row(step) for step in range(31, 61))]
    second = make_run(folder / "a_rather_long_name_of_a_run_that_was_moved_to_fsdp", moved, {"run": {"seed": 7}})
    with (first / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 60, "sample": "def main() -> None:\n" + 40 * "    a_long_name = 1; "}) + "\n")
    (second / "evaluation").mkdir()
    result = {"task": "hellaswag", "step": 60, "acc": 0.2955, "acc_interval": [0.291, 0.3], "protocol": "x" * 200}
    (second / "evaluation" / "hellaswag.json").write_text(json.dumps(result))
    write_report([first, second], folder / "out")
    return (folder / "out" / PAGE_FILE).read_text()


class TestReadingRuns:
    def test_the_charts_of_an_ordinary_run(self, run: Path) -> None:
        charts = {chart.name: chart for chart in charts_of(read_runs([run]))}
        assert set(charts) == CHARTS
        training, validation = charts["loss_by_tokens"].curves
        assert training.x == [step * 2048 for step in range(1, 61)]
        assert training.y == [training_row(step)["loss"] for step in range(1, 61)]
        assert (validation.x, validation.y) == ([0, 40960, 81920, 122880], [10.9, 3.8, 3.6, 3.4])

    def test_losses_of_averaged_weights_are_beside_those_of_the_weights(self, tmp_path: Path) -> None:
        rows = [{**row, "val_ema_loss": row["val_loss"] + 0.5} if "val_loss" in row else row for row in ordinary_rows()]
        run = make_run(tmp_path / "run", rows)
        charts = {chart.name: chart for chart in charts_of(read_runs([run]))}
        for name in ("loss_by_steps", "loss_by_tokens", "loss_by_time"):
            _, validation, averaged = charts[name].curves
            assert averaged.label == "run, validation of EMA" and averaged.averaged and not validation.averaged
            assert (averaged.x, averaged.y) == (validation.x, [loss + 0.5 for loss in validation.y])
        assert "run, validation of EMA" in draw(charts["loss_by_steps"]).svg
        assert summary_table(read_runs([run])).rows["validation loss of EMA, last"] == ["3.9000"]

    @pytest.mark.parametrize(("hours", "unit", "last"), [(1, "minutes", 60.0), (30, "hours", 30.0)])
    def test_time_is_in_the_unit_that_fits(self, tmp_path: Path, hours: float, unit: str, last: float) -> None:
        run = make_run(tmp_path / "run", [training_row(1), training_row(2, elapsed_s=hours * 3600)])
        chart = next(chart for chart in charts_of(read_runs([run])) if chart.name == "loss_by_time")
        assert chart.axis.label == unit and chart.curves[0].x[-1] == last

    def test_a_run_without_validation_and_without_wall_clock(self, tmp_path: Path) -> None:
        rows = [training_row(step) for step in (1, 2, 3)]
        for row in rows:
            del row["elapsed_s"]
        charts = {chart.name: chart for chart in charts_of(read_runs([make_run(tmp_path / "run", rows)]))}
        assert set(charts) == CHARTS - {"loss_by_time"}
        assert [curve.dotted for curve in charts["loss_by_steps"].curves] == [False]

    def test_a_value_that_is_not_finite_leaves_a_gap(self, tmp_path: Path) -> None:
        rows = [training_row(1), training_row(2, loss=None, grad_norm=None), training_row(3)]
        charts = {chart.name: chart for chart in charts_of(read_runs([make_run(tmp_path / "run", rows)]))}
        assert charts["loss_by_steps"].curves[0].x == [1, 3]

    def test_a_torn_line_and_no_config(self, run: Path) -> None:
        metrics = run / "metrics.jsonl"
        metrics.write_bytes(metrics.read_bytes()[:-20])
        (run / "config.json").unlink()
        (read,) = read_runs([run])
        assert len(read.rows) == len(ordinary_rows()) - 1 and read.settings == {}

    def test_a_rolled_back_run_has_one_curve(self, tmp_path: Path) -> None:
        folder = tmp_path / "run"
        folder.mkdir()
        record = RunRecord(tiny_config(folder, logging={"sinks": ["jsonl", "console"]}))
        record.start(0)
        for step in range(1, 6):
            record.write(training_row(step, loss=99.0 if step > 3 else 5.0))
        record.rewind(3)
        record.write({"step": 3, "left_out_samples": [30, 40]})
        for step in range(4, 7):
            record.write(training_row(step, loss=4.0))
        record.close(0, "finished", {})
        charts = {chart.name: chart for chart in charts_of(read_runs([folder]))}
        (curve,) = charts["loss_by_steps"].curves
        assert (curve.x, curve.y) == ([1, 2, 3, 4, 5, 6], [5.0, 5.0, 5.0, 4.0, 4.0, 4.0])
        (timed,) = charts["loss_by_time"].curves
        assert timed.x == sorted(timed.x), "time does not go back"

    def test_runs_of_one_name_are_told_apart(self, tmp_path: Path) -> None:
        folders = [make_run(tmp_path / name / "run", [training_row(1)]) for name in ("a", "b")]
        assert [run.label for run in read_runs(folders)] == ["a/run", "b/run"]

    def test_the_difference_covers_the_steps_that_both_have_logged(self, tmp_path: Path) -> None:
        first = make_run(tmp_path / "a", [training_row(step, loss=5.0) for step in (1, 2, 4)])
        second = make_run(tmp_path / "b", [training_row(step, loss=5.5) for step in (2, 3, 4)])
        chart = next(chart for chart in charts_of(read_runs([first, second])) if chart.name == "loss_difference")
        assert [(curve.x, curve.y) for curve in chart.curves] == [([2, 4], [0.5, 0.5])]

    def test_a_legend_takes_no_space_from_the_curves(self) -> None:
        """Twelve lines of a legend squeezed the plot so far that it cut its first points off."""
        curves = [Curve(i, f"run {i}", [1.0, 2.0], [10.9, 3.3]) for i in range(12)]
        heights = {}
        for count in (1, 12):
            svg = draw(Chart("loss", "Loss", STEPS, curves[:count], logarithmic=True), names_runs=True).svg
            assert f"> run {count - 1}<" in svg
            low, high = re.findall(r'id="patch_3".*?d="M [\d.]+ ([\d.]+) ?\s*L [\d.]+ ([\d.]+)', svg, re.DOTALL)[0]
            heights[count] = float(low) - float(high)
        assert heights[12] == pytest.approx(heights[1], rel=0.05)
        assert "run 0" not in draw(Chart("loss", "Loss", STEPS, curves[:1])).svg, "the page shows only this run"

    def test_a_long_curve_keeps_its_spikes(self) -> None:
        points = [(float(i), math.sin(i / 1000)) for i in range(100_000)]
        points[54_321] = (54_321.0, 9.0)
        points[65_432] = (65_432.0, -9.0)
        kept = thin_out(points)
        assert len(kept) <= MOST_POINTS and kept == sorted(kept)
        assert points[54_321] in kept and points[65_432] in kept


class TestTables:
    def test_the_summary_names_backends_and_devices(self, tmp_path: Path) -> None:
        rows = [*ordinary_rows(30), start_row(30, "FSDP2 with AdamW", 4), training_row(31, skipped_steps=2)]
        table = summary_table(read_runs([make_run(tmp_path / "run", rows)])).rows
        assert table["computed on"] == [
            "DDP with fused AdamW, 1 process, cpu (x86_64)\nfrom step 30: FSDP2 with AdamW, 4 processes, cpu (x86_64)"
        ]
        assert table["steps"] == ["31 of 19,073"] and table["parameters"] == ["7,200,000"]
        assert table["validation loss, best"] == ["3.8000"] and table["skipped steps"] == ["2"]
        assert table["model"] == ["gpt2"] and "validation loss of EMA, last" not in table
        changed = make_run(tmp_path / "changed", rows, {"model": {"n_layer": 6}})
        assert summary_table(read_runs([changed])).rows["model"] == ["gpt2 with n_layer 6"]
        assert "failed saves" not in table

    def test_results_of_any_shape(self, run: Path) -> None:
        (run / "evaluation").mkdir()
        result = {
            "task": "x",
            "step": 60,
            "checkpoint": "c",
            "acc": 0.29551,
            "acc_interval": [0.2911, 0.3],
            "examples": 10042,
            "data_sha256": "0123456789abcdef" * 4,
            "protocol": "completion style",
            "loss_by_position": [1.0, 2.0, 3.0],
            "parts": {"a": {"loss": 1.0}},
            "bits_per_byte": None,
        }
        (run / "evaluation" / "x.json").write_text(json.dumps(result))
        assert evaluation_table(read_runs([run])).rows == {
            "x, at step": ["60"],
            "x acc": ["0.2955"],
            "x acc_interval": ["0.2911 to 0.3000"],
            "x examples": ["10,042"],
            "x data_sha256": ["0123456789abcdef"],
            "x protocol": ["completion style"],
        }

    def test_results_of_older_weights_are_marked(self, run: Path) -> None:
        shutil.copytree(REPOSITORY / "tests" / "data" / "before_rooms" / "run" / "checkpoints", run / "checkpoints")
        newest = read_manifest(list_checkpoints(run)[-1])
        results = {
            "now": {"step": 3, "weights_sha256": newest.weights_sha256()},
            "now_ema": {"step": 3, "weights_sha256": newest.weights_sha256("ema"), "weights": "ema"},
            "before": {"step": 2, "weights_sha256": "0" * 64},
        }
        (run / "evaluation").mkdir()
        for task, result in results.items():
            (run / "evaluation" / f"{task}.json").write_text(json.dumps(result))
        steps = {"before": "2, not the weights of the newest checkpoint", "now": "3", "now_ema": "3"}
        cells = evaluation_table(read_runs([run])).rows
        assert {task: cells[f"{task}, at step"] for task in results} == {task: [text] for task, text in steps.items()}

    def test_settings_of_one_run_against_the_defaults(self, tmp_path: Path) -> None:
        run = make_run(tmp_path / "a", [], {"run": {"name": "n", "seed": 5}, "backend": {"deepspeed": {"a": {"b": 1}}}})
        table = settings_table(read_runs([run]))
        assert table.columns == ["default", "a"]
        assert table.rows["run.seed"] == ["1337", "5"] and table.rows["backend.deepspeed.a.b"] == ["", "1"]
        assert "run.name" not in table.rows

    def test_settings_of_several_runs_against_each_other(self, tmp_path: Path) -> None:
        runs = [make_run(tmp_path / name, [], {"run": {"seed": seed}}) for name, seed in (("a", 5), ("b", 6))]
        assert settings_table(read_runs(runs)).rows == {"run.seed": ["5", "6"]}

    def test_the_summary_begins_with_the_date_and_the_data(self, tmp_path: Path) -> None:
        first = start_row(0, "DDP", 1)
        first["started"]["time"] = "2026-11-26T14:03:25+00:00"
        mixture = [{"path": "data/a", "weight": 1.0}, {"path": "data/b", "weight": 2.0}]
        one = make_run(tmp_path / "one", [first], {"data": {"path": "data/code"}})
        mixed = make_run(tmp_path / "mixed", [first], {"data": {"path": None, "mixture": mixture}})
        table = summary_table(read_runs([one, mixed])).rows
        assert list(table)[:2] == ["started", "data"]
        assert table["started"] == ["2026-11-26 14:03"] * 2 and table["data"] == ["data/code", "data/a\ndata/b"]

    def test_negative_numbers_have_a_minus_sign(self, run: Path) -> None:
        (run / "evaluation").mkdir()
        (run / "evaluation" / "x.json").write_text(json.dumps({"task": "x", "gain": -0.25, "small": -2e-5}))
        rows = evaluation_table(read_runs([run])).rows
        assert rows["x gain"] == ["\N{MINUS SIGN}0.2500"] and rows["x small"] == ["\N{MINUS SIGN}2e\N{MINUS SIGN}05"]


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (3.2, 11.0, [3.5, 4, 4.5, 5, 6, 7, 8, 9, 10]),
        (2.3, 11.0, [3, 4, 5, 6, 8, 10]),
        (0.04, 20.0, [0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20]),
        (1e-9, 1e9, [1e-9, 1e-6, 1e-3, 1, 1e3, 1e6, 1e9]),
        (3.1, 3.4, []),
    ],
)
def test_a_logarithmic_axis_has_ticks_at_both_ends(low: float, high: float, ticks: list[float]) -> None:
    assert log_ticks(low, high) == pytest.approx(ticks)


class TestWriting:
    def test_page_and_pictures(self, run: Path, tmp_path: Path) -> None:
        written = write_report([run], tmp_path / "out")
        assert written[0] == tmp_path / "out" / PAGE_FILE
        assert {path.stem for path in written[1:]} == CHARTS
        assert all(path.read_bytes().startswith(b"\x89PNG") for path in written[1:])
        assert {path.name for path in (tmp_path / "out").iterdir()} == {path.name for path in written}

    def test_the_page_needs_nothing_from_elsewhere(self, report: str) -> None:
        without_namespaces = re.sub(r'xmlns(:\w+)?="[^"]*"', "", report)
        assert (
            "http" not in without_namespaces and "<script" not in report and "url(" not in report.replace("url(#", "")
        )

    def test_names_and_texts_are_not_markup_and_the_last_text_is_at_the_top(self, tmp_path: Path) -> None:
        texts = [{"step": step, "sample": f"<p>text {step}\nline"} for step in (1, 2)]
        rows = [*ordinary_rows(4), *texts]
        first = make_run(tmp_path / "_<b>$x$ & $y$", rows, {"data": {"path": "<i>&"}})
        second = make_run(tmp_path / "b", ordinary_rows(4))
        write_report([first, second], tmp_path / "out")
        page = (tmp_path / "out" / PAGE_FILE).read_text()
        assert "<b>" not in page and "<i>" not in page
        assert page.count("_&lt;b&gt;$x$ &amp; $y$, training") == 3, "in the legends of the three loss charts"
        assert page.index("<h2>Runs") < page.index("&lt;p&gt;text 2\nline") < page.index("<h2>Curves")
        assert "text 1" not in page and ", step 2</figcaption>" in page

    def test_a_run_that_has_logged_nothing_yet(self, tmp_path: Path) -> None:
        write_report([make_run(tmp_path / "run", [])], tmp_path / "out")
        assert "Nothing has been logged yet." in (tmp_path / "out" / PAGE_FILE).read_text()

    def test_a_folder_without_a_run(self, tmp_path: Path) -> None:
        with pytest.raises(ReportError, match="has no metrics.jsonl, so no run has trained here"):
            write_report([tmp_path], tmp_path / "out")
        assert not (tmp_path / "out").exists()

    def test_a_folder_that_cannot_be_written(self, run: Path, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        with pytest.raises(DataError, match=r"--out: cannot write .*file/report; name a place that you may write to"):
            write_report([run], tmp_path / "file" / "report")

    def test_without_matplotlib(self, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delitem(sys.modules, "pipeline.report.drawing", raising=False)
        monkeypatch.setitem(sys.modules, "matplotlib", None)
        with pytest.raises(ReportError, match=r"a report needs matplotlib .*: python -m pip install .*\[plots\]"):
            write_report([run], tmp_path / "out")


@needs_browser
class TestInABrowser:
    @pytest.mark.parametrize("width", [PHONE, DESKTOP])
    @pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
    def test_every_plot_is_drawn_and_readable(self, report: str, width: int, dark: bool) -> None:
        seen = look_at(report, width, dark=dark)
        assert seen.console == []
        assert seen.width <= width, "the page scrolls sideways"
        assert len(seen.pictures) == len(CHARTS) + 1, "and the difference between the two"
        for picture in seen.pictures:
            assert picture["width"] > 300 and picture["height"] > 200 and picture["right"] <= width
            assert picture["lines"] >= 3, "two axes and a curve"
        assert seen.smallest_text >= 10
        for table in seen.tables:
            assert table["inner"] <= table["shown"], "both runs are beside each other, without scrolling"
            assert table["right"] - table["left"] > 0.85 * min(width, 1250), "the table uses the width of the page"
        assert (sum(rgb(seen.background)) < sum(rgb(seen.ink))) == dark

    def test_the_colours_of_pictures_follow_the_page(self, report: str) -> None:
        light, dark = (look_at(report, DESKTOP, dark=is_dark).pictures[0]["stroke"] for is_dark in (False, True))
        assert light != dark


def rgb(colour: str) -> list[int]:
    return [int(part) for part in re.findall(r"\d+", colour)[:3]]
