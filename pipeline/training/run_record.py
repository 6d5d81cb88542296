"""Write the files that describe a run: the resolved config, the metrics and the TensorBoard events."""

import logging
import math
import time
from pathlib import Path
from typing import Any

from data_tools.storage.atomic import write_json_durably
from pipeline.checkpoint.background import SaveOutcome
from pipeline.config.deepspeed_keys import changes_of_numbers
from pipeline.config.loading import dump_config
from pipeline.config.schema import Config
from pipeline.run_folder.layout import CONFIG_FILE
from pipeline.run_folder.metrics import DIFFERENT_NUMBERS_KEY, MetricsFile, format_row, read_metrics
from pipeline.run_folder.tensorboard import TensorBoardLog

log = logging.getLogger(__name__)


class RunRecord:
    """Writes rows to ``metrics.jsonl``, TensorBoard and the console, on the main rank only.

    Each row has ``elapsed_s``, the wall-clock seconds that the run has taken in all its starts together. The time
    between two starts does not count.

    If an earlier start has written rows for steps after ``resumed_step``, these rows are deleted. If the config has
    keys because of which the results can differ from those of other backends, each row names these keys.
    """

    def __init__(self, config: Config, *, is_main: bool, resumed_step: int) -> None:
        self.config = config
        self.run_folder = Path(config.run.out_dir)
        self.failed_saves = 0
        self._changes = changes_of_numbers(config.backend)
        self._started = time.perf_counter()
        self._outputs: list[MetricsFile | TensorBoardLog] = []  # none on the other ranks
        self._tensorboard: TensorBoardLog | None = None
        if is_main:
            if resumed_step:
                elapsed = (row.get("elapsed_s", 0.0) for row in read_metrics(self.run_folder))
                self._started -= max(elapsed, default=0.0)
            write_json_durably(self.run_folder / CONFIG_FILE, dump_config(config))
            self._outputs.append(MetricsFile(self.run_folder, resumed_step))
            if config.logging.tensorboard:
                self._tensorboard = TensorBoardLog(self.run_folder, resumed_step)
                self._outputs.append(self._tensorboard)

    def write(self, row: dict[str, Any], *, console: bool = True) -> None:
        """Write one row. The row must have the key ``step``.

        NaN and infinity are written as null, because JSON lacks them.
        """
        if self._outputs:
            row = {key: None if isinstance(x, float) and not math.isfinite(x) else x for key, x in row.items()}
            row["elapsed_s"] = round(time.perf_counter() - self._started, 3)
            if self._changes:
                row[DIFFERENT_NUMBERS_KEY] = self._changes
            for output in self._outputs:
                output.write(row)
            if console:
                log.info(format_row(row, self.config.schedule.max_steps))

    def write_saves(self, outcomes: list[SaveOutcome]) -> None:
        """Write rows about finished saves of checkpoints.

        A failed save is logged and counted, but does not stop the run.
        """
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
        """Delete the rows of steps after ``step``, because the run was rolled back to ``step``."""
        for output in self._outputs:
            output.rewind(step)

    def close(self, results: dict[str, float]) -> None:
        """Write the hyperparameters and the final results to TensorBoard, and close all files."""
        if self._tensorboard:
            finite = {f"final/{name}": value for name, value in results.items() if math.isfinite(value)}
            self._tensorboard.write_hyperparameters(dump_config(self.config), finite)
        for output in self._outputs:
            output.close()
