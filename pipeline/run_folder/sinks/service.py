"""Send a run's rows of metrics to a service such as W&B or MLflow.

A thread sends the rows, so that a slow server does not stop the run.
"""

import json
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import Any

from data_tools.errors import one_line
from data_tools.storage.atomic import write_json_durably
from pipeline.run_folder.layout import CONFIG_FILE, METRICS_FILE, REPORT_PAGE
from pipeline.run_folder.metrics import read_metrics
from pipeline.run_folder.sinks.sink import Row, Sink

log = logging.getLogger(__name__)

LONGEST_END_S = 30.0  # how long a run waits at its end for rows that are not sent yet


class Service(ABC):
    """A connection to a service that stores rows of metrics and cannot delete them. Methods may raise any error."""

    name: str

    @abstractmethod
    def connect(self, config: dict[str, Any], run_id: str | None) -> str:
        """Continue the service's run ``run_id``, or create a run if ``run_id`` is None. Return the id of the run."""

    @abstractmethod
    def send(self, rows: Sequence[Row]) -> None:
        """Send rows in the given order."""

    @abstractmethod
    def attach(self, files: Sequence[Path]) -> None:
        """Upload files. If the service already has a file with the same name, replace it."""

    @abstractmethod
    def end(self, summary: Row) -> None:
        """Send the run's summary, and end the run in the service. A later ``connect`` can continue this run."""


class ServiceSink(Sink):
    """Sends each row of ``metrics.jsonl`` to a service exactly once, also if the run resumes or the server is down.

    A resumed run writes the rows after its checkpoint again, but a service cannot delete rows. If ``waits`` is True,
    each row therefore waits until the run has saved a checkpoint of the row's step or a later step. If the run deletes
    rows that the service already has, the sink creates a new run in the service, and sends all remaining rows.

    ``NAME_run.json`` in the run folder stores how many rows were sent. The next start of the run sends the missing
    rows, even if the run is complete.
    """

    def __init__(self, service: Service, run_folder: Path, *, waits: bool) -> None:
        self._service = service
        self._run_folder = run_folder
        self._waits = waits
        self._config: dict[str, Any] = {}
        self._held: list[Row] = []  # rows that wait for a checkpoint
        self._queued = 0  # the number of rows that were queued or sent
        self._queued_step = -1  # the largest step of these rows
        self._jobs: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        # The following attributes belong to the thread.
        self._run_id: str | None = None
        self._is_connected = False
        self._unsent: list[Row] = []
        self._sent = 0
        self._sent_step = -1
        self._failures = 0
        self._thread = Thread(target=self._work, name=f"{service.name} sink", daemon=True)

    @property
    def name(self) -> str:
        return self._service.name

    @property
    def _state_file(self) -> Path:
        return self._run_folder / f"{self._service.name}_run.json"

    def start(self, config: dict[str, Any], resumed_step: int) -> None:
        self._config = config
        kept = read_metrics(self._run_folder)
        state = self._read_state()
        if state["sent_step"] <= resumed_step and state["rows"] <= len(kept):
            self._run_id, self._sent = state["run_id"], state["rows"]
            self._queued = self._sent
            self._queued_step = self._sent_step = state["sent_step"]
        self._held = kept[self._sent :]
        self._thread.start()
        self._jobs.put(self._flush)  # the service shows the run and its config before the first rows
        self.settle(resumed_step)

    @property
    def is_complete(self) -> bool:
        """Return whether the service has all rows and the summary of the run. Read this property before ``start``."""
        state = self._read_state()
        return state["ended"] and state["rows"] == len(read_metrics(self._run_folder))

    def _read_state(self) -> dict[str, Any]:
        with suppress(OSError, ValueError, KeyError, TypeError):
            state = json.loads(self._state_file.read_text(encoding="utf-8"))
            numbers = {key: int(state[key]) for key in ("rows", "sent_step")}
            return {"run_id": str(state["run_id"]), **numbers, "ended": state.get("ended") is True}
        return {"run_id": None, "rows": 0, "sent_step": -1, "ended": False}

    def write(self, row: Row) -> None:
        self._held.append(row)
        if not self._waits:
            self._queue(len(self._held))

    def settle(self, step: int) -> None:
        later = (number for number, row in enumerate(self._held) if row["step"] > step)
        self._queue(next(later, len(self._held)))

    def _queue(self, count: int) -> None:
        rows, self._held = self._held[:count], self._held[count:]
        if rows:
            self._queued += len(rows)
            self._queued_step = max(self._queued_step, *(row["step"] for row in rows))
            self._jobs.put(lambda: self._send(rows))

    def rewind(self, step: int) -> None:
        if self._queued_step <= step:
            self._held = [row for row in self._held if row["step"] <= step]
            return
        self._held = [row for row in read_metrics(self._run_folder) if row["step"] <= step]
        self._queued, self._queued_step = 0, -1
        self._jobs.put(self._start_again)
        self._queue(len(self._held))

    def end(self, summary: Row) -> None:
        self._jobs.put(lambda: self._end(summary))
        self._jobs.put(None)
        self._thread.join(LONGEST_END_S)
        name = self._service.name
        if self._thread.is_alive():
            self._failures += 1
            log.warning("%s: the service did not answer within %.0f s at the end of the run", name, LONGEST_END_S)
        left = self._queued - self._sent
        if self._failures:
            log.warning("%s: failures: %d; rows that were not sent: %d", name, self._failures, left)
        if left:
            log.warning("%s: %s has all rows; start this run again to send the rest", name, METRICS_FILE)

    # The thread calls the following methods.

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            job()

    def _send(self, rows: list[Row]) -> None:
        self._unsent += rows
        if self._jobs.empty():  # otherwise, send these rows together with later ones
            self._flush()

    def _flush(self) -> None:
        with self._failures_counted():
            if not self._is_connected:
                self._run_id = self._service.connect(self._config, self._run_id)
                self._is_connected = True
                self._write_state()
                self._service.attach([self._run_folder / CONFIG_FILE])
            if self._unsent:
                self._service.send(self._unsent)
                self._sent += len(self._unsent)
                self._sent_step = max(self._sent_step, *(row["step"] for row in self._unsent))
                self._unsent = []
                self._write_state()

    def _start_again(self) -> None:
        """Continue in a new run of the service, without the rows that were sent to the earlier run."""
        if self._is_connected:
            with self._failures_counted():
                self._service.end({"state": "superseded"})
        self._is_connected, self._run_id, self._unsent, self._sent, self._sent_step = False, None, [], 0, -1

    def _end(self, summary: Row) -> None:
        self._flush()
        if self._is_connected:
            with self._failures_counted():
                files = [self._run_folder / REPORT_PAGE, self._run_folder / METRICS_FILE]
                self._service.attach([file for file in files if file.exists()])
                self._service.end(summary)
                self._write_state(ended=True)

    def _write_state(self, *, ended: bool = False) -> None:
        state = {"run_id": self._run_id, "rows": self._sent, "sent_step": self._sent_step, "ended": ended}
        write_json_durably(self._state_file, state)

    @contextmanager
    def _failures_counted(self) -> Iterator[None]:
        """Return a context manager that catches and counts every error in its block. Only the first error is logged."""
        try:
            yield
        except Exception as error:  # noqa: BLE001 - a library may raise anything
            self._failures += 1
            if self._failures == 1:
                log.warning("%s: cannot send (%s); the run continues and tries again later", self.name, one_line(error))
