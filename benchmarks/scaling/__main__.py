"""Compare predicted with measured step times: 1, 2 and 4 processes, and two hosts with slow links.

The hosts are Linux namespaces. A prediction uses these measured values, but never the measured step:

- the time of the backend's forward and backward pass, and of the update, while all processes compute but send nothing.
  With more processes than cores, this time includes the waits for a core.
- the bandwidth and the latency of gloo. They are measured with the same number of processes on this machine, and
  without a limit on the link.
- how long a rank waits for the slowest rank in a collective. Small all-reduces between matrix products measure this
  wait.

python -m benchmarks.scaling                # what `make scaling` runs; run nothing else on the machine
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pipeline.config.loading import load_config
from pipeline.data.batch_plan import plan_batch
from pipeline.distributed.rendezvous import free_port
from pipeline.planning.collectives import StepCollectives, step_collectives
from pipeline.planning.communication import Cluster, Link
from pipeline.planning.speed import communication_waits, compute_seconds
from tests.support.hosts import Lab, NamespacesError
from tests.support.runs import REPOSITORY, child_environment
from tests.support.tables import print_header, print_row

BACKENDS = ("ddp", "fsdp")
PROCESSES = (1, 2, 4)
LIMITS_MBIT = (1000, 200, 50)
COLUMNS = ("processes", "link", "backend", "sent, predicted", "sent, measured", "step, predicted", "measured", "ratio")
LARGEST_DIFFERENCE = 0.20
PAYLOAD = 1448 / 1514  # the share of data in an Ethernet frame with a TCP packet; the limit of a link counts frames
PORT = 29400
BUCKET_MIB = 2  # several buckets, so that communication can overlap with computation
TIMEOUT_S = 600
MODEL = {"n_layer": 4, "n_head": 4, "n_embd": 192, "vocab_size": 2048, "context_length": 256}


def write_config(path: Path, processes: int) -> Path:
    """Write a config with one micro-batch per process and step."""
    tokens = 4 * MODEL["context_length"] * processes
    sections = {
        "run": {"precision": "fp32", "compile": False, "device": "cpu", "out_dir": str(path.parent / "run")},
        "model": MODEL,
        "batch": {"tokens_per_step": tokens, "micro_batch_size": 4},
        "backend": {"ddp": {"bucket_cap_mb": BUCKET_MIB}},
        "evaluation": {"sample": False},
    }
    path.write_text(json.dumps(sections))
    return path


def start_rank(
    config: Path, rank: int, processes: int, steps: int, lab: Lab | None, port: int
) -> subprocess.Popen[str]:
    """Start one rank, on this machine or on a host of its own."""
    arguments = ["--config", str(config), "--backends", *BACKENDS, "--steps", str(steps)]
    command = [sys.executable, str(REPOSITORY / "benchmarks" / "scaling" / "rank.py"), *arguments]
    world: dict[str, object] = {"RANK": rank, "WORLD_SIZE": processes, "MASTER_PORT": port}
    if lab:
        command = lab.hosts[rank].command([*command, "--interface", "eth0"])
        world |= {"LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1, "MASTER_ADDR": lab.hosts[0].name}
    else:
        world |= {"LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": processes, "MASTER_ADDR": "localhost"}
    launched = {name: str(value) for name, value in world.items()} if processes > 1 else {}
    environment = {**child_environment(), "OMP_NUM_THREADS": "1", **launched}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)


def measure(folder: Path, processes: int, steps: int, limit_mbit: int | None = None) -> dict[str, Any]:
    """Run all ranks, and return what the main rank measured."""
    config = write_config(folder / f"{processes}.json", processes)
    if limit_mbit is None:
        port = free_port()
        return _wait([start_rank(config, rank, processes, steps, None, port) for rank in range(processes)])
    with Lab(processes, folder / f"lab-{limit_mbit}") as lab:
        for host in lab.hosts:
            host.limit(limit_mbit)
        return _wait([start_rank(config, rank, processes, steps, lab, PORT) for rank in range(processes)])


def _wait(ranks: Sequence[subprocess.Popen[str]]) -> dict[str, Any]:
    try:
        outputs = [rank.communicate(timeout=TIMEOUT_S)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    if any(rank.returncode for rank in ranks):
        sys.exit("error: a rank failed; its error is above")
    return dict(json.loads(outputs[0].splitlines()[-1]))


def predict(
    backend: str, config: Path, processes: int, inputs: dict[str, Any], limit_mbit: int | None
) -> tuple[float, int]:
    """Return the predicted seconds of a step, and the bytes that a rank sends."""
    run = load_config([config], [f"backend.name={backend}"])
    collectives = step_collectives(run, plan_batch(run, processes))
    pass_s = inputs[f"{backend}_pass_s"]
    step_s = compute_seconds(collectives, pass_s) + inputs["update_s"] / run.backend.ranks_per_copy(processes)
    if processes == 1:
        return step_s, 0
    link = Link(inputs["link"]["bytes_per_s"], inputs["link"]["latency_s"])
    cluster = Cluster(processes, link, link)
    if limit_mbit is not None:
        cluster = Cluster(1, link, Link(min(link.bytes_per_s, PAYLOAD * limit_mbit * 1e6 / 8), link.latency_s))
    # Without a slow link, gloo needs the cores that compute. Only waits for a slow link overlap with DDP's computation.
    overlaps = backend == "ddp" and limit_mbit is not None
    waits = communication_waits(collectives, pass_s, cluster, overlaps=overlaps)
    # FSDP2 waits for the slowest rank in each collective, and DDP at the end of the backward pass.
    meetings = count_collectives(collectives) if backend == "fsdp" else 1
    return step_s + waits.total_s + meetings * inputs["link"]["straggler_s"], collectives.sent_bytes


def count_collectives(collectives: StepCollectives) -> int:
    """Return the number of a step's collectives that include more than one rank."""
    within = (
        (count, collective)
        for count, stages in collectives.micro_steps()
        for stage in stages
        for collective in (*stage.gathers, *stage.reductions)
    )
    after = ((1, collective) for collective in collectives.after)
    return sum(count for count, collective in (*within, *after) if collective.group.size > 1)


def print_inputs(processes: int, values: dict[str, Any]) -> None:
    link, name = values["link"], "process" if processes == 1 else "processes"
    times = ", ".join(f"{name[:-2]} {1e3 * values[name]:.1f} ms" for name in ("ddp_pass_s", "fsdp_pass_s", "update_s"))
    speed = ""
    if link:
        waits = (f"{name[:-2]} {1e3 * link[name]:.2f} ms" for name in ("latency_s", "straggler_s"))
        speed = f", gloo {link['bytes_per_s'] / 1e6:.0f} MB/s, " + ", ".join(waits)
    print(f"{processes} {name} on {os.cpu_count()} cores: {times}{speed}", flush=True)


def print_comparison(config: Path, processes: int, limit_mbit: int | None, values: dict[str, Any]) -> Iterator[str]:
    """Print one row per backend. Yield a message for each prediction that is too far from the measured time."""
    link = "this machine" if limit_mbit is None else f"{limit_mbit} Mbit/s"
    for backend in BACKENDS:
        predicted_s, sent = predict(backend, config, processes, values, limit_mbit)
        ratio = predicted_s / values[backend]
        times = (f"{1e3 * seconds:.0f} ms" for seconds in (predicted_s, values[backend]))
        sizes = [f"{size / 1e6:.1f} MB" for size in (sent, values[f"{backend}_sent_bytes"])]
        if limit_mbit is None:
            sizes[1] = ""  # the processes share the counter of the loopback interface
        print_row(processes, link, backend, *sizes, *times, f"{ratio:.2f}")
        if abs(ratio - 1) > LARGEST_DIFFERENCE:
            yield f"{processes} processes, {link}, {backend}: the ratio is {ratio:.2f}"


def main(argv: Sequence[str] | None = None) -> str | int:
    """Return a message about all problems, or 0 if there are none."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=9, help="measured steps per row (default: %(default)s)")
    parser.add_argument(
        "--limits", type=int, nargs="*", default=LIMITS_MBIT, metavar="MBIT", help="limits of the links"
    )
    arguments = parser.parse_args(argv)
    problems: list[str] = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        measured = {processes: measure(folder, processes, arguments.steps) for processes in PROCESSES}
        for processes, values in measured.items():
            print_inputs(processes, values)
        print_header(*COLUMNS)
        for processes, values in measured.items():
            problems += print_comparison(folder / f"{processes}.json", processes, None, values)
        for limit in arguments.limits:
            values = {**measure(folder, 2, arguments.steps, limit), "link": measured[2]["link"]}
            problems += print_comparison(folder / "2.json", 2, limit, values)
    return "\n".join(problems) or 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except NamespacesError as error:
        sys.exit(f"error: {error}")
