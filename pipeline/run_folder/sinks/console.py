"""Log one line per training step and per validation."""

import logging
from typing import Any

from pipeline.run_folder.metrics import LOSSES, format_row
from pipeline.run_folder.sinks.sink import Row, Sink

log = logging.getLogger(__name__)


class Console(Sink):
    """Logs the rows that have a loss.

    Rows without a loss are not logged here, because they are too long, or because the code that writes them also logs a
    message.
    """

    def __init__(self) -> None:
        self._max_steps = 0

    def start(self, config: dict[str, Any], resumed_step: int) -> None:
        self._max_steps = config["schedule"]["max_steps"]

    def write(self, row: Row) -> None:
        if LOSSES.keys() & row.keys():
            log.info(format_row(row, self._max_steps))
