"""Measure checkpoints of GPT-2 124M: the pause of a save, the throughput of saving and loading, and peak memory.

python -m benchmarks.checkpoint_cost        # what `make checkpoint-cost` runs; run nothing else on the machine
"""

from __future__ import annotations

import argparse
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path

from benchmarks.memory import watch_peak_bytes
from pipeline.hardware.device import GIB
from pipeline.run_folder.metrics import read_metrics
from tests.support.live_run import LiveRun
from tests.support.runs import Sections, make_corpus, merged
from tests.support.tables import print_header, print_row

STEPS, SAVED_AT = 6, 2
SIDES = (("ddp", 1), ("fsdp", 2), ("zero2", 2), ("zero3", 2), ("ddp", 2))

GPT2_RUN: Sections = {
    "run": {"device": "cpu", "precision": "fp32"},
    "model": {"preset": "gpt2"},
    "data": {"seq_len": 128},
    "batch": {"tokens_per_step": 256, "micro_batch_size": 1},
    "schedule": {"warmup_steps": 1},
    "evaluation": {"every_steps": 1000, "max_batches": 1},
    "logging": {"every_steps": 1, "sinks": ["jsonl", "console"]},
}
_LOADED = re.compile(r"loaded \S+ in ([\d.]+) s, ([\d,]+) MB/s")


@dataclass(frozen=True)
class Measured:
    """The metrics and the output of one run, and the peak resident memory of the rank with the highest peak."""

    rows: list[dict[str, float]]
    output: str
    peak_gib: float

    def step_ms(self, steps: range) -> float:
        times = sorted(row["step_ms"] for row in self.rows if "step_ms" in row and row["step"] in steps)
        return times[len(times) // 2]


def measure(backend: str, processes: int, folder: Path, sections: Sections) -> Measured:
    with LiveRun(backend, folder, sections, processes) as run:
        peak_bytes = watch_peak_bytes(run.process)
        if run.wait():
            raise RuntimeError(run.output)
        return Measured(read_metrics(folder), run.output, peak_bytes / GIB)


def row_of(backend: str, processes: int, data: Path, scratch: Path) -> list[str]:
    """Measure three runs: one that saves only at the end, one that also saves earlier, and one that resumes."""
    base = merged(GPT2_RUN, {"data": {"path": str(data)}})

    def run(name: str, sections: Sections) -> Measured:
        return measure(backend, processes, scratch / f"{backend}{processes}-{name}", merged(base, sections))

    quiet = run("quiet", {"schedule": {"max_steps": STEPS}, "checkpoint": {"every_steps": 1000}})
    saving = run("saving", {"schedule": {"max_steps": STEPS}, "checkpoint": {"every_steps": SAVED_AT}})
    source = scratch / f"{backend}{processes}-saving"
    resumed = {"every_steps": 1000, "resume": str(source)}
    loading = run("loading", {"schedule": {"max_steps": STEPS + 1}, "checkpoint": resumed})
    first, later, *_ = [row for row in saving.rows if "save_s" in row]
    peak_before_a_save = max(row["peak_memory_gib"] for row in quiet.rows if "peak_memory_gib" in row)  # main rank
    loaded = _LOADED.search(loading.output)
    assert loaded, loading.output
    return [
        backend,
        str(processes),
        f"{first['save_bytes'] / 1e6:,.0f} MB",
        f"{quiet.step_ms(range(2, STEPS + 1)):,.0f} ms",
        f"{saving.step_ms(range(SAVED_AT + 1, SAVED_AT + 3)):,.0f} ms",
        f"{first['save_pause_s'] * 1e3:,.0f} ms",
        f"{later['save_pause_s'] * 1e3:,.0f} ms",
        f"{first['save_s']:.1f} s, {first['save_bytes'] / first['save_s'] / 1e6:,.0f} MB/s",
        f"{loaded[1]} s, {loaded[2]} MB/s",
        f"{peak_before_a_save:.2f} GiB",
        f"{saving.peak_gib:.2f} GiB",
        f"{loading.peak_gib:.2f} GiB",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    columns = ["backend", "processes", "state", "step", "step while saving", "pause, first save", "pause, later saves"]
    columns += ["save", "load", "peak without a save", "peak with saves", "peak of a resumed run"]
    print_header(*columns)
    with tempfile.TemporaryDirectory() as scratch:
        data = make_corpus(Path(scratch) / "data")
        for backend, processes in SIDES:
            print_row(*row_of(backend, processes, data, Path(scratch)))


if __name__ == "__main__":
    main()
