"""Log one line per training row and per validation, and show a progress bar on a terminal."""

import json
import logging
import time
from typing import Any

from tqdm import tqdm

from data_tools.formatting import format_duration
from pipeline.run_folder.metrics import LOSSES, MEAN_LOSS_KEY, SAMPLE_KEY, format_row, format_step
from pipeline.run_folder.sinks.sink import Row, Sink

log = logging.getLogger(__name__)


class Console(Sink):
    """Logs the rows of metrics that have a loss, with the time of day and the estimated time left.

    On a terminal, this sink also shows a progress bar.
    """

    def __init__(self) -> None:
        self._max_steps = 0
        self._first: tuple[int, float] | None = None  # step and elapsed_s of this start's first training row
        self._bar = tqdm(disable=True)

    def start(self, config: dict[str, Any], resumed_step: int) -> None:
        self._max_steps = config["schedule"]["max_steps"]
        self._bar = tqdm(
            desc="training",
            total=self._max_steps,
            initial=resumed_step,
            unit="step",
            dynamic_ncols=True,
            bar_format="{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]",
            leave=False,
            disable=None,  # shows the bar only on a terminal
        )

    def write(self, row: Row) -> None:
        if LOSSES.keys() & row.keys():
            columns = [format_row(row, self._max_steps), time.strftime("%H:%M:%S")]
            if left_s := self._estimate_left_s(row):
                columns.append(f"{format_duration(left_s)} left")
            log.info(" | ".join(columns))
            if row.get(MEAN_LOSS_KEY) is not None:
                loss = f"loss {row[MEAN_LOSS_KEY]:.4f}"
                self._bar.set_postfix_str(f"{loss}, {format_duration(left_s)} left" if left_s else loss)

        if SAMPLE_KEY in row:
            text = json.dumps(row[SAMPLE_KEY], ensure_ascii=False)  # one line
            log.info("%s | sample %s", format_step(row, self._max_steps), text)

    def count_step(self, step: int) -> None:
        self._bar.update(step - self._bar.n)

    def rewind(self, step: int) -> None:
        self._first = None
        self._bar.update(step - self._bar.n)
        self._bar.refresh()

    def end(self, summary: Row) -> None:
        self._bar.close()

    def _estimate_left_s(self, row: Row) -> float | None:
        """Return the estimated seconds until the last step, or None.

        The estimate ignores the first training row, because its steps may include compilation.
        """
        if MEAN_LOSS_KEY not in row or "elapsed_s" not in row:
            return None
        step, elapsed_s = row["step"], row["elapsed_s"]
        if self._first is None or step <= self._first[0]:
            self._first = (step, elapsed_s)
            return None
        first_step, first_s = self._first
        return float((self._max_steps - step) * (elapsed_s - first_s) / (step - first_step))
