"""The training jobs on two nodes. Two small scripts replace Slurm, and both nodes are this machine."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.checkpoint.layout import list_checkpoints
from tests.support.runs import (
    CONFIGS,
    REPOSITORY,
    TINY_BYTE_RUN,
    child_environment,
    last_logged_step,
    merged,
    overrides,
)

SLURM = REPOSITORY / "launch" / "slurm"
STEPS = 100_000  # more than can be trained, so that the signal ends the run

SRUN = """#!/usr/bin/env bash
# One task per node, in its own process group, like a job step of Slurm.
echo $BASHPID > "$GROUP_FILE"
for node in 0 1; do SLURM_NODEID=$node "$@" & done
status=0
for task in $(jobs -p); do wait "$task" || status=$?; done
exit $status
"""
SCONTROL = "#!/usr/bin/env bash\nprintf '%s\\n' localhost 127.0.0.1\n"


@pytest.mark.parametrize(("script", "backend"), [("train_torchrun", "fsdp"), ("train_deepspeed", "zero1")])
def test_two_nodes_train_and_save_at_the_signal_of_slurm(
    script: str, backend: str, byte_corpus: Path, tmp_path: Path
) -> None:
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)
    changes = {"run": {"compile": False}, "data": {"path": str(byte_corpus)}, "schedule": {"max_steps": STEPS}}
    sections = merged(TINY_BYTE_RUN, changes)
    config = [str(CONFIGS / f"{backend}.json"), "--set", *overrides(sections), f"run.out_dir={tmp_path / 'run'}"]
    slurm = {
        "SLURM_SUBMIT_DIR": str(REPOSITORY),
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_JOB_NODELIST": "node[0-1]",
        "GROUP_FILE": str(tmp_path / "group"),
        "PYTHON": sys.executable,
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
        "DS_ACCELERATOR": "cpu",
    }
    with open(tmp_path / "output", "w+") as output:
        job = subprocess.Popen(
            ["setsid", "bash", str(SLURM / f"{script}.sbatch"), "--config", *config],
            env={**os.environ, **child_environment(), **slurm},
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        try:
            wait_for_steps(job, tmp_path / "run")
            warn(int((tmp_path / "group").read_text()))
            job.wait(120)
        finally:
            job.kill()
    said = (tmp_path / "output").read_text()
    assert "world size 2" in said
    stopped = re.search(r"SIGUSR1 received: stopped after step (\d+)", said)
    assert stopped and job.returncode not in (0, -signal.SIGUSR1), said
    assert list_checkpoints(tmp_path / "run")[-1].name == f"step_{int(stopped[1]):08}"
    assert not list(REPOSITORY.glob("hostfile-*"))


def wait_for_steps(job: subprocess.Popen[bytes], run_folder: Path) -> None:
    until = time.monotonic() + 180
    while last_logged_step(run_folder) < 2:
        assert job.poll() is None and time.monotonic() < until
        time.sleep(0.1)


def warn(step: int) -> None:
    """Send SIGUSR1 to every process of a job step, but not to the batch script, as Slurm does."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            pid, parent = int(stat.parent.name), int(stat.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue  # has ended meanwhile
        children.setdefault(parent, []).append(pid)
    waiting = children.get(step, [])
    while waiting:
        pid = waiting.pop()
        waiting += children.get(pid, [])
        os.kill(pid, signal.SIGUSR1)
