"""Check a machine with GPUs: correctness, speed, memory and, with several GPUs, overlap and scaling.

python -m benchmarks.gpu_check                         # what `make gpu-check` runs: nine minutes
python -m benchmarks.gpu_check --minutes 20 --out runs/h100
python -m benchmarks.gpu_check --device cpu            # rehearse the check without a GPU, at a tiny size

The most important steps run first. After each step, the command writes OUT/page.md and OUT/results.json. It ends within
the given minutes. The next call continues with the remaining steps.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path
from types import FrameType

from benchmarks.gpu_check.page import render
from benchmarks.gpu_check.plan import Check, patient
from benchmarks.gpu_check.steps import FAILED, PASSED, Figures, Record, Runner, Stage, Step, write_text
from benchmarks.train_command import add_peer_option
from tests.support.runs import PYTHON_PATH, REPOSITORY

PAGE_FILE = "page.md"
MACHINE = "machine"
MEMORY_OF_A_STEP_GIB = 4  # a step measures products of 8192 x 8192 fp32 numbers, and libraries also need memory
IDENTITY = ("device_type", "device", "devices", "torch")  # results of machines with other values are not mixed


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=9.0, help="time for this call (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="folder of the result (default: runs/gpu_check, or _cpu)")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu rehearses at a tiny size")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="only these steps, such as 'curve ddp *' 'speed *'")
    parser.add_argument("--repeat-failed", action="store_true", help="also repeat the steps that failed before")
    add_peer_option(parser)
    return parser.parse_args(arguments)


def find_machine(device: str, runner: Runner) -> Figures:
    """Return the description of the machine.

    Raises:
        SystemExit: the machine cannot be described, or the folder has results of another machine.
    """
    record = runner.record
    known = record.outcomes.pop(MACHINE, {}).get("figures", {})
    file = record.folder / MACHINE / "machine.json"
    step = Step(
        MACHINE,
        [sys.executable, "-m", "benchmarks.gpu_check.machine", device, str(file)],
        lambda _: dict(json.loads(file.read_text(encoding="utf-8"))),
        limit_s=120,
        usual_s=10,
        environment={"PYTHONPATH": PYTHON_PATH},
    )
    if device == "cpu":
        step = patient(step)
    runner.run_one(step)
    found = record.figures(MACHINE)
    if record.status(MACHINE) != PASSED:
        outcome = record.outcomes.get(MACHINE, {"problem": "there is no time for it"})
        reason = "; ".join([outcome["problem"], *outcome.get("log", [])[-1:]])
        raise SystemExit(f"error: the machine cannot be described: {reason}")
    changed = [key for key in IDENTITY if known and known[key] != found[key]]
    if changed:
        record.add(MACHINE, {"status": PASSED, "figures": known})
        differences = ", ".join(f"{key} {known[key]} is now {found[key]}" for key in changed)
        raise SystemExit(f"error: {record.folder} has results of another machine ({differences}); use another --out")
    return found


def chosen_stages(stages: Sequence[Stage], names: Sequence[str] | None) -> list[Stage]:
    """Return the stages with the steps whose names match the patterns. Without patterns, return all steps."""
    if names is None:
        return list(stages)
    return [
        replace(stage, steps=[step for step in stage.steps if any(fnmatch(step.name, name) for name in names)])
        for stage in stages
    ]


def workers_for(machine: Figures) -> int:
    """Return how many steps run at the same time. Steps that measure time or memory always run alone."""
    by_cores, by_memory = machine["cores"] // 2, int(machine["memory_gib"] // MEMORY_OF_A_STEP_GIB)
    return max(1, min(8, max(2, by_cores), by_memory))


def _exit_on_signal(number: int, _: FrameType | None) -> None:
    """Raise KeyboardInterrupt. Like Ctrl-C, it stops the running children."""
    raise KeyboardInterrupt(signal.Signals(number).name)


def main(argv: Sequence[str] | None = None) -> str | int:
    """Run the steps that fit into the time. Returns a message if a step failed."""
    arguments = parse_arguments(argv)
    deadline = time.monotonic() + arguments.minutes * 60
    signal.signal(signal.SIGTERM, _exit_on_signal)
    default = "gpu_check" if arguments.device == "cuda" else "gpu_check_cpu"
    folder = (arguments.out or REPOSITORY / "runs" / default).absolute()
    command = f"python -m benchmarks.gpu_check {shlex.join(sys.argv[1:] if argv is None else argv)}".strip()
    os.chdir(REPOSITORY)
    record = Record(folder)
    runner = Runner(record, deadline, workers=1, repeat_failed=arguments.repeat_failed)
    machine = find_machine(arguments.device, runner)
    check = Check(folder, machine, tuple(arguments.peer_command))
    record.on_change = lambda record: write_text(folder / PAGE_FILE, render(check, record, command))
    record.on_change(record)
    runner.workers = workers_for(machine)
    stages = check.stages()
    try:
        runner.run(chosen_stages(stages, arguments.only))
    except KeyboardInterrupt as interrupt:
        print(f"stopped by {interrupt or 'Ctrl-C'}; the same command continues", flush=True)
        return 1
    statuses = [record.status(step.name) for stage in stages for step in stage.steps]
    print(
        f"{folder / PAGE_FILE}: {statuses.count(PASSED)} steps passed, {statuses.count(FAILED)} failed, "
        f"{statuses.count(None)} not reached",
        flush=True,
    )
    return f"{statuses.count(FAILED)} steps failed" if FAILED in statuses else 0


if __name__ == "__main__":
    sys.exit(main())
