"""Profile some training steps. Write a trace of these steps, and a table of the slowest operators."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, schedule

from pipeline.run_folder.layout import PROFILE_FOLDER

log = logging.getLogger(__name__)

TRACE_FILE, TABLE_FILE = "trace.json", "top_kernels.txt"
#: Steps before the profile, for compilation, first allocations and the profiler's warm-up.
SETTLING_STEPS = 5
_ROWS, _LOGGED_ROWS, _LONGEST_NAME = 40, 8, 90


class StepProfile:
    """Profiles ``steps`` training steps on the CPU and on the device.

    Writes a Chrome trace (for chrome://tracing or ui.perfetto.dev) and a table to ``profile/`` in the run folder. If
    ``steps`` is 0, the object does nothing.

    Args:
        is_main: if False, nothing is profiled. Only the main rank profiles its steps.
    """

    def __init__(self, run_folder: Path, device: torch.device, steps: int, *, is_main: bool = True) -> None:
        self._folder = run_folder / PROFILE_FOLDER
        self._device = device
        self._steps = steps
        self._is_main = is_main
        self._profiler: profile | None = None
        self._written = False

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Return a context manager that profiles the steps inside its block.

        After the block, the context manager writes the trace and the table.
        """
        if not (self._steps and self._is_main):
            yield
            return
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (self._device.type == "cuda")
        plan = schedule(wait=SETTLING_STEPS - 1, warmup=1, active=self._steps, repeat=1)
        with profile(activities=activities, schedule=plan, on_trace_ready=self._write) as profiler:
            self._profiler = profiler
            yield
        self._profiler = None
        if not self._written:
            log.warning("no profile was written: it begins after %d steps, and the run ended earlier", SETTLING_STEPS)

    def takes_long_after(self, steps: int) -> bool:
        """Return whether the profiler warms up, or writes its files, when this step is counted. All ranks agree.

        The profiled steps follow the warm-up without a pause, so that the host queues them early, as in other steps.

        Args:
            steps: the number of steps so far, including this step.
        """
        return self._steps > 0 and steps in (SETTLING_STEPS - 1, SETTLING_STEPS + self._steps)

    def count_step(self) -> None:
        """Count an optimizer step that was queued on the device."""
        if self._profiler:
            self._profiler.step()

    def _write(self, profiler: profile) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        trace, table = self._folder / TRACE_FILE, self._folder / TABLE_FILE
        profiler.export_chrome_trace(str(trace))
        own_time = "self_device_time_total" if self._device.type == "cuda" else "self_cpu_time_total"
        averages = profiler.key_averages()
        table.write_text(averages.table(sort_by=own_time, row_limit=_ROWS, max_name_column_width=100), encoding="utf-8")
        self._written = True
        rows = [(getattr(row, own_time), row.key) for row in averages if self._is_work(row)]
        total_us = sum(time_us for time_us, _ in rows)
        if not total_us:
            log.warning("profile of %d steps: %s; it has no time on %s", self._steps, trace, self._device.type)
            return
        log.info("profile of %d steps: %s, %s; the operators that took longest:", self._steps, trace, table)
        for time_us, name in sorted(rows, reverse=True)[:_LOGGED_ROWS]:
            log.info("  %5.1f%%  %s", 100 * time_us / total_us, name[:_LONGEST_NAME])

    def _is_work(self, row: Any) -> bool:
        """Return whether a row is a kernel (on a GPU) or an operator (on a CPU).

        On a GPU, the rows of operators include the time of their kernels. This time must not count twice.
        """
        on_gpu = row.device_type == DeviceType.CUDA
        return on_gpu == (self._device.type == "cuda") and not row.is_user_annotation
