"""What a run leaves to be read, beside its checkpoints: resolved config, metrics, the console's lines."""

from __future__ import annotations

import logging
import math
import time
from pathlib import Path
from typing import Any

from data_tools.storage.atomic import write_json_durably
from pipeline.checkpoint import SaveOutcome
from pipeline.config.loading import dump_config
from pipeline.config.schema import Config
from pipeline.run_folder.layout import CONFIG_FILE
from pipeline.run_folder.metrics import MetricsLog, format_row, read_metrics

log = logging.getLogger(__name__)


class RunRecord:
    """Rows go to ``metrics.jsonl``, TensorBoard and the console. Ranks but the main one keep none.

    Each row says how long the run has taken: ``elapsed_s``, wall-clock seconds over all its starts. What was lost to a
    crash counts in as far as it was logged, the time between two starts does not.

    Args:
        resumed_step: rows after it are dropped: the run will write them again.
    """

    def __init__(self, config: Config, *, is_main: bool, resumed_step: int) -> None:
        self.config = config
        self.run_folder = Path(config.run.out_dir)
        self.failed_saves = 0
        self._started = time.perf_counter()
        self._metrics = self._open(resumed_step) if is_main else None

    def _open(self, resumed_step: int) -> MetricsLog:
        if resumed_step:
            self._started -= max((row.get("elapsed_s", 0.0) for row in read_metrics(self.run_folder)), default=0.0)
        write_json_durably(self.run_folder / CONFIG_FILE, dump_config(self.config))
        return MetricsLog(self.run_folder, resumed_step=resumed_step, tensorboard=self.config.logging.tensorboard)

    def write(self, row: dict[str, Any], *, console: bool = True) -> None:
        """One row; ``row["step"]`` is required. Numbers that are not finite become null, which JSON has."""
        if self._metrics:
            row = {key: None if isinstance(x, float) and not math.isfinite(x) else x for key, x in row.items()}
            row["elapsed_s"] = round(time.perf_counter() - self._started, 3)
            self._metrics.write(row)
            if console:
                log.info(format_row(row, self.config.schedule.max_steps))

    def write_start(self, step: int, **started: str | int) -> None:
        """What the run is and computes on from here: it may change with every start."""
        self.write({"step": step, "started": started}, console=False)

    def write_saves(self, outcomes: list[SaveOutcome]) -> None:
        """How saves ended: a failed one is a warning and a counter, and no reason to stop."""
        for outcome in outcomes:
            if saved := outcome.saved:
                log.info("%s, training paused %.3f s", saved, outcome.pause_s)
                row = {"save_s": saved.seconds, "save_pause_s": outcome.pause_s, "save_bytes": saved.total_bytes}
            else:
                self.failed_saves += 1
                log.warning("%s; failed saves in this run: %d", outcome.problem, self.failed_saves)
                row = {"failed_saves": self.failed_saves}
            self.write({"step": outcome.step, **row}, console=False)

    def rewind(self, step: int) -> None:
        """Drop the rows after ``step``: the run has gone back to it."""
        if self._metrics:
            self._metrics.rewind(step)

    def close(self, results: dict[str, float]) -> None:
        """Write settings and final results for TensorBoard's HPARAMS page, and close."""
        if self._metrics:
            finite = {f"final/{name}": value for name, value in results.items() if math.isfinite(value)}
            self._metrics.write_hyperparameters(dump_config(self.config), finite)
            self._metrics.close()
