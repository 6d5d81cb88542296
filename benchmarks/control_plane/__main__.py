"""Measure the control plane of a run with thousands of simulated ranks. No rank computes a step.

python -m benchmarks.control_plane --ranks 4096        # what `make control-plane` runs
python -m benchmarks.control_plane --ranks 64 --seconds 3

The ranks are threads in a few processes on this machine, with a real ``TCPStore``. The network is not measured.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path

from benchmarks.control_plane.checkpoints import measure_checkpoint, shapes_of
from benchmarks.control_plane.steps import measure_loader, measure_metrics
from benchmarks.control_plane.store import measure_store
from tests.support.tables import print_header, print_row


def measure(ranks: int, processes: int, seconds: float, timeout_s: float, preset: str) -> Iterator[tuple[str, str]]:
    """Yield (name, value with its unit) for each measurement."""
    yield from measure_store(ranks, processes, seconds, timeout_s)
    with tempfile.TemporaryDirectory() as folder:
        yield from measure_checkpoint(ranks, Path(folder), shapes_of(preset))
        yield from measure_loader(ranks, Path(folder))
    yield from measure_metrics(ranks)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=4096)
    parser.add_argument("--processes", type=int, default=2, help="processes that contain the ranks as threads")
    parser.add_argument("--seconds", type=float, default=15.0, help="the time in which heartbeats are counted")
    parser.add_argument("--timeout", type=float, default=10.0, help="seconds until a silent rank counts as lost")
    parser.add_argument("--preset", default="gpt2", help="the model whose checkpoint is written")
    chosen = parser.parse_args()
    print_header("what", f"{chosen.ranks:,} ranks")
    for what, value in measure(chosen.ranks, chosen.processes, chosen.seconds, chosen.timeout, chosen.preset):
        print_row(what, value)


if __name__ == "__main__":
    main()
