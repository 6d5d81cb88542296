"""Log one line per training row and per validation."""

import logging
import time
from typing import Any

from pipeline.run_folder.metrics import LOSSES, MEAN_LOSS_KEY, format_duration, format_row
from pipeline.run_folder.sinks.sink import Row, Sink

log = logging.getLogger(__name__)


class Console(Sink):
    """Logs the rows that have a loss, with the time of day. Training rows after the first one show the time left.

    Rows without a loss are not logged here, because they are too long, or because the code that writes them also logs a
    message.
    """

    def __init__(self) -> None:
        self._max_steps = 0
        self._first: tuple[int, float] | None = None  # the step and elapsed_s of the first training row of this start

    def start(self, config: dict[str, Any], resumed_step: int) -> None:
        self._max_steps = config["schedule"]["max_steps"]

    def write(self, row: Row) -> None:
        if LOSSES.keys() & row.keys():
            columns = [format_row(row, self._max_steps), time.strftime("%H:%M:%S")]
            if left_s := self._estimate_left_s(row):
                columns.append(f"{format_duration(left_s)} left")
            log.info(" | ".join(columns))

    def rewind(self, step: int) -> None:
        self._first = None

    def _estimate_left_s(self, row: Row) -> float | None:
        """Return the estimated seconds until the last step. Returns None if the row does not tell.

        The first step of a start is not used, because it may compile the model.
        """
        if MEAN_LOSS_KEY not in row or "elapsed_s" not in row:
            return None
        step, elapsed_s = row["step"], row["elapsed_s"]
        if self._first is None or step <= self._first[0]:
            self._first = (step, elapsed_s)
            return None
        first_step, first_s = self._first
        return float((self._max_steps - step) * (elapsed_s - first_s) / (step - first_step))
