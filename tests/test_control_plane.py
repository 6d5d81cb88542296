"""Many ranks start, send heartbeats, name a lost rank and write a checkpoint, with a bounded number of requests."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from benchmarks.control_plane.checkpoints import measure_checkpoint
from benchmarks.control_plane.steps import measure_loader, measure_metrics
from tests.support.runs import REPOSITORY, child_environment

RANKS = 64
#: A network without name servers, if the system allows to make one. torch asks them for the names of connections.
ALONE = ["unshare", "--net", "sh", "-c", 'ip link set lo up && exec "$@"', "sh"]
STORE = f"""
from benchmarks.control_plane.store import measure_store
for what, value in measure_store({RANKS}, processes=1, seconds=1.0, timeout_s=1.0):
    print(what, value, sep="=", flush=True)
"""


def test_the_store_gets_a_bounded_number_of_requests_per_rank() -> None:
    """``measure_store`` also checks that all ranks name the rank that was lost."""
    can_unshare = subprocess.run([*ALONE, "true"], capture_output=True).returncode == 0
    command = [*(ALONE if can_unshare else []), sys.executable, "-c", STORE]
    measured = subprocess.run(command, cwd=REPOSITORY, env=child_environment(), capture_output=True, text=True)
    assert measured.returncode == 0, measured.stderr
    values = dict(line.split("=") for line in measured.stdout.splitlines())
    seconds = float(values["start: until all ranks have connected and agreed"].removesuffix(" s")) + 0.1
    assert float(values["start: requests per rank"]) < 12 + seconds / 0.02  # while ranks wait, they poll every 20 ms
    assert float(values["heartbeats: requests per rank and second"]) < 3
    assert values["store: connections"] == str(2 * RANKS)
    waited_s = float(values["upload: until rank 0 has the results of all ranks"].removesuffix(" s")) + 0.1
    assert float(values["upload: requests per rank"]) < 12 + waited_s / 0.2  # while a rank waits, it polls every 0.5 s


def test_a_checkpoint_of_many_ranks_is_complete(tmp_path: Path) -> None:
    """One parameter has fewer rows than there are ranks."""
    rows = dict(measure_checkpoint(RANKS, tmp_path, {"wte.weight": [96, 4], "ln_f.bias": [8]}))
    assert rows[f"checkpoint: pieces, in {2 * RANKS} files"] == str(3 * (48 + 8))


def test_the_ranks_read_each_sample_once_and_name_the_slow_rank(tmp_path: Path) -> None:
    """The functions check this, and yield CPU times."""
    for _, value in (*measure_loader(RANKS, tmp_path), *measure_metrics(RANKS)):
        assert re.fullmatch(r"[\d.]+ (us|ms)", value)
