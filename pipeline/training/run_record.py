"""Pass the rows of metrics of a run to the log sinks."""

import logging
import math
import time
from pathlib import Path
from typing import Any

from data_tools.errors import UserError, one_line_write_errors
from pipeline.checkpoint.background import SaveOutcome
from pipeline.checkpoint.mirror import UploadOutcome
from pipeline.config.deepspeed_keys import changes_of_numbers
from pipeline.config.loading import dump_config
from pipeline.config.schema import Config, LoggingConfig
from pipeline.report.page import write_report
from pipeline.run_folder.layout import METRICS_FILE, REPORT_FOLDER
from pipeline.run_folder.metrics import DIFFERENT_NUMBERS_KEY, MEAN_LOSS_KEY, read_metrics
from pipeline.run_folder.sinks import SERVICES, ServiceSink, Sink, create_sinks
from pipeline.training.uploads import log_upload

log = logging.getLogger(__name__)


class RunRecord:
    """Writes rows to the log sinks that ``logging.sinks`` selects. Only the main rank writes.

    ``start`` opens the sinks. Before this call, and on the other ranks, ``write`` does nothing.

    Some keys of ``backend.deepspeed`` can make the results differ from those of other backends. If the config sets such
    keys, each row lists them.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        self.run_folder = Path(config.run.out_dir)
        self.failed_saves = 0
        self.uploads = 0
        self.failed_uploads = 0
        self._upload_problem: str | None = None  # the reason why the last upload failed
        self._changes = changes_of_numbers(config.backend)
        self._started = time.perf_counter()
        self._sinks: list[Sink] = []

    def start(self, resumed_step: int) -> None:
        """Open the sinks, and delete the rows of steps after ``resumed_step``. Call this on the main rank only.

        Raises DataError if the rows cannot be deleted, for example because the disk is full.
        """
        with one_line_write_errors(self.run_folder / METRICS_FILE):
            if resumed_step:
                elapsed = (row.get("elapsed_s", 0.0) for row in read_metrics(self.run_folder))
                self._started -= max(elapsed, default=0.0)
            for sink in _create_sinks(self.config.logging, self.run_folder):
                sink.start(dump_config(self.config), resumed_step)
                self._sinks.append(sink)  # only now, because ``close`` must not touch a sink that has not started

    def elapsed_s(self) -> float:
        """Return how many seconds the run has taken so far, as wall-clock time.

        The time includes earlier processes of a resumed run, without the pauses between them.
        """
        return round(time.perf_counter() - self._started, 3)

    def write(self, row: dict[str, Any]) -> None:
        """Write one row, which must have the key ``step``. NaN and infinity are written as null."""
        if self._sinks:
            row = _without_nan(row)
            row["elapsed_s"] = self.elapsed_s()
            if self._changes:
                row[DIFFERENT_NUMBERS_KEY] = self._changes
            for sink in self._sinks:
                sink.write(row)

    def count_step(self, step: int) -> None:
        """Tell the sinks how many steps were started so far. Call this method once per step."""
        for sink in self._sinks:
            sink.count_step(step)

    def write_saves(self, outcomes: list[SaveOutcome]) -> None:
        """Write one row per finished save of a checkpoint. A failed save is only logged and counted.

        A save of NaN or infinite numbers counts as a failed save, because no run can resume from this checkpoint.
        """
        for outcome in outcomes:
            row: dict[str, Any] = {}
            if saved := outcome.saved:
                row = {"save_s": saved.seconds, "save_pause_s": outcome.pause_s, "save_bytes": saved.total_bytes}
                if not outcome.failure:
                    log.info("%s, training paused %.3f s", saved, outcome.pause_s)
            if outcome.failure:
                self.failed_saves += 1
                log.warning("%s; failed saves in this run: %d", outcome.failure, self.failed_saves)
                row["failed_saves"] = self.failed_saves
            self.write({"step": outcome.step, **row})
            if not outcome.failure:
                for sink in self._sinks:
                    sink.settle(outcome.step)

    def write_uploads(
        self, outcomes: list[UploadOutcome], then: str = "training continues, and the next save tries again"
    ) -> None:
        """Write one row per outcome of an upload, and log it.

        A failed upload is not logged if the previous upload has failed for the same reason.

        Args:
            then: what happens after a failed upload.
        """
        for outcome in outcomes:
            if outcome.problem is None or outcome.problem != self._upload_problem:
                log_upload(str(self.config.checkpoint.remote), outcome, then)
            if outcome.problem is None:
                self.uploads += 1
                row: dict[str, Any] = {"upload_s": outcome.seconds, "upload_bytes": outcome.bytes}
            else:
                self.failed_uploads += 1
                row = {"failed_uploads": self.failed_uploads}
            self._upload_problem = outcome.problem
            self.write({"step": outcome.step, **row})

    def rewind(self, step: int) -> None:
        """Delete the rows of steps after ``step``, because the run has gone back to this step."""
        for sink in self._sinks:
            sink.rewind(step)

    def close(self, step: int, ended: str, results: dict[str, float]) -> None:
        """Write a row about the end of the run, send a summary to all sinks, and close them.

        After this call, ``write`` does nothing.

        Args:
            ended: ``finished``, ``interrupted`` (a checkpoint is saved) or ``failed``.
            results: maps the names of losses to their last values.
        """
        self.write({"step": step, "ended": ended})
        uploads = self._summarize_uploads()
        if any(isinstance(sink, ServiceSink) for sink in self._sinks):
            _write_report(self.run_folder)
        elapsed_s = self.elapsed_s()
        for sink in self._sinks:
            if ended != "failed":
                sink.settle(step)
            sink.end({"state": ended, "step": step, "elapsed_s": elapsed_s, **_without_nan(results), **uploads})
        self._sinks = []

    def _summarize_uploads(self) -> dict[str, int]:
        url = self.config.checkpoint.remote
        if url is None:
            return {}
        problem = f"; the last one failed: {self._upload_problem}" if self._upload_problem else ""
        log.info("uploads to %s: %d, failed uploads: %d%s", url, self.uploads, self.failed_uploads, problem)
        return {"uploads": self.uploads, "failed_uploads": self.failed_uploads}


def send_missing_rows(config: Config) -> None:
    """Send the rows and the summary of a complete run to services that lack them. Call this on the main rank only."""
    run_folder = Path(config.run.out_dir)
    services = config.logging.model_copy(update={"sinks": [name for name in config.logging.sinks if name in SERVICES]})
    sinks = [sink for sink in _create_sinks(services, run_folder) if isinstance(sink, ServiceSink)]
    behind = [sink for sink in sinks if not sink.is_complete]
    rows = read_metrics(run_folder)
    if not behind or not rows:
        return
    _write_report(run_folder)
    summary = _summarize(rows)
    for sink in behind:
        log.info("%s: sending what it does not have yet", sink.name)
        sink.start(dump_config(config), summary["step"])
        sink.end(summary)


def _summarize(rows: list[dict[str, Any]]) -> dict[str, Any]:
    last = {key: value for row in rows for key, value in row.items() if value is not None}
    names = {"loss": "loss", MEAN_LOSS_KEY: MEAN_LOSS_KEY, "validation_loss": "val_loss"}
    results = {name: last[key] for name, key in names.items() if key in last}
    return {"state": "finished", "step": last["step"], "elapsed_s": last.get("elapsed_s", 0.0), **results}


def _write_report(run_folder: Path) -> None:
    """Write the report of a run. Every error is only logged, because it must not hide the error of the run."""
    try:
        write_report([run_folder], run_folder / REPORT_FOLDER)
    except (UserError, OSError) as error:
        log.info("the sinks get no report: %s", error)
    except Exception as error:  # noqa: BLE001 - a library that draws may raise anything
        log.warning("the sinks get no report: %r", error)


def _create_sinks(config: LoggingConfig, run_folder: Path) -> list[Sink]:
    return create_sinks(config.sinks, run_folder, config.project, waits_for_checkpoint=config.wait_for_checkpoint)


def _without_nan(row: dict[str, Any]) -> dict[str, Any]:
    return {key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in row.items()}
