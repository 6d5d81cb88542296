"""Measure how fast a run trains on a CPU while other processes use the same cores.

python -m benchmarks.busy_machine                                  # the defaults of this project and of libgomp
python -m benchmarks.busy_machine --spins 0 1000 10000 300000 --busy 0 2 6

The table has one row per number of busy processes, and one column per value of ``GOMP_SPINCOUNT``: how many times
an OpenMP thread polls for work before it sleeps. A round measures each value once. The cells are medians over the
rounds, in tokens per second.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from pipeline.distributed.environment import DEFAULT_SPINS
from pipeline.run_folder.metrics import read_metrics
from tests.support.runs import PYTHON_PATH, TRAIN, Sections, make_corpus, ranks_command, train_arguments
from tests.support.tables import print_header, print_row

LIBGOMP_SPINS = 300_000
FIRST_STEPS = 2  # not counted
BUSY_LOOP = "while True: pass"


def main() -> None:
    """Print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--spins", nargs="+", type=int, default=[DEFAULT_SPINS, LIBGOMP_SPINS])
    parser.add_argument("--busy", nargs="+", type=int, default=[0, 2, 6], help="numbers of busy processes")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=10, help="training steps per measurement (default: %(default)s)")
    parser.add_argument("--width", type=int, default=384, help="of the model with six layers (default: %(default)s)")
    parser.add_argument("--compile", action="store_true")
    arguments = parser.parse_args()
    print(f"{torch.get_num_threads()} threads, tokens/s by GOMP_SPINCOUNT\n")
    print_header("busy processes", *map(str, arguments.spins))
    with tempfile.TemporaryDirectory() as scratch:
        sections = run_sections(make_corpus(Path(scratch, "data")), arguments)
        for busy in arguments.busy:
            speeds: dict[int, list[float]] = {spins: [] for spins in arguments.spins}
            for number in range(arguments.rounds):
                for spins in arguments.spins[:: 1 if number % 2 == 0 else -1]:
                    with busy_processes(busy):
                        speeds[spins].append(training_speed(Path(scratch, f"{busy}-{number}-{spins}"), sections, spins))
            print_row(busy, *(f"{statistics.median(found):.0f}" for found in speeds.values()))


def run_sections(data: Path, arguments: argparse.Namespace) -> Sections:
    """Return the config of a short run: a model of 30 million parameters at the default width."""
    width = arguments.width
    return {
        "run": {"device": "cpu", "precision": "amp_bf16", "compile": arguments.compile},
        "model": {"n_layer": 6, "n_head": width // 64, "n_embd": width, "context_length": 256},
        "data": {"path": str(data), "verify": False},
        "batch": {"tokens_per_step": 1024, "micro_batch_size": 4},
        "schedule": {"warmup_steps": 1, "max_steps": arguments.steps},
        "checkpoint": {"every_steps": arguments.steps, "asynchronous": False},
        "evaluation": {"every_steps": 1000, "max_batches": 1, "tasks": []},
        "logging": {"every_steps": 1, "sinks": ["jsonl"]},
    }


@contextmanager
def busy_processes(count: int) -> Iterator[None]:
    """Keep ``count`` processes busy inside the ``with`` block."""
    processes = [subprocess.Popen([sys.executable, "-c", BUSY_LOOP]) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def training_speed(run_folder: Path, sections: Sections, spins: int) -> float:
    """Train a run with a value of ``GOMP_SPINCOUNT``. Return its median tokens/s after the first steps."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("OMP_", "GOMP_"))}
    environment |= {"GOMP_SPINCOUNT": str(spins), "PYTHONPATH": PYTHON_PATH}
    command = ranks_command(1, TRAIN, train_arguments("ddp", run_folder, sections))
    subprocess.run(command, env=environment, check=True, capture_output=True)
    return statistics.median(speeds_of_steps(run_folder)[FIRST_STEPS:])


def speeds_of_steps(run_folder: Path) -> Sequence[float]:
    """Return the tokens/s of each step that a run has logged."""
    return [row["tokens_per_s"] for row in read_metrics(run_folder) if "tokens_per_s" in row]


if __name__ == "__main__":
    main()
