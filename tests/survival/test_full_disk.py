"""Training continues on a disk that is full or read-only. A checkpoint of this run takes 32 MB."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.runs import REPOSITORY, TRAIN, Sections, child_environment, train_arguments
from tests.survival.conftest import STEPS


def in_small_tmpfs(folder: Path, size: str, script: str) -> subprocess.CompletedProcess[str]:
    """Run a shell script with a small file system at ``folder``, mounted in a user namespace."""
    mounted = f"mount -t tmpfs -o size={size} tmpfs {folder} && {script}"
    return subprocess.run(
        ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", mounted],
        cwd=REPOSITORY,
        env=child_environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )


def can_mount_tmpfs() -> bool:
    probe = subprocess.run(
        ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", "mount -t tmpfs tmpfs /mnt"],
        capture_output=True,
    )
    return probe.returncode == 0


pytestmark = pytest.mark.skipif(not can_mount_tmpfs(), reason="this machine does not allow a tmpfs in a user namespace")


def train_command(folder: Path, sections: Sections, after: str = "") -> str:
    arguments = " ".join(f"'{argument}'" for argument in train_arguments("ddp", folder, sections))
    look = f"ls -A {folder}/checkpoints; tail -c 300 {folder}/metrics.jsonl"
    return f"{after} {sys.executable} {TRAIN} {arguments}; echo status $?; {look}"


def test_training_continues_and_a_failed_last_save_is_an_error(large_sections: Sections, tmp_path: Path) -> None:
    """One checkpoint fits; the second, the third and the last cannot be written."""
    result = in_small_tmpfs(tmp_path, "40m", train_command(tmp_path / "run", large_sections))
    output = result.stdout + result.stderr
    assert "No space left on device" in output and "failed saves in this run: 1" in output
    assert "failed saves in this run: 2" in output
    assert f"step {STEPS}/{STEPS} | loss" in output, "training continued to its last step"
    assert "error: cannot save" in output and "status 2" in output
    assert "\nstep_00000004\n" in output and ".partial" not in output.split("status 2")[1]
    assert "Traceback" not in output


def test_space_that_is_freed_in_time_is_no_error(large_sections: Sections, tmp_path: Path) -> None:
    """Another file fills the disk while the first saves are due, and is then deleted."""
    folder = tmp_path / "run"
    filler = f"{tmp_path}/filler"
    freed = (
        f"dd if=/dev/zero of={filler} bs=1M count=85 2>/dev/null; "
        f"(until grep -qs '\"step\": 6,' {folder}/metrics.jsonl; do sleep 0.05; done; rm {filler}) &"
    )
    result = in_small_tmpfs(tmp_path, "110m", train_command(folder, large_sections, freed))
    output = result.stdout + result.stderr
    assert "failed saves in this run: 1" in output and "status 0" in output, output
    assert "step_00000014" in output and "Traceback" not in output


def test_a_disk_that_becomes_read_only(large_sections: Sections, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    turned = (
        f"(until grep -qs '\"step\": 5,' {folder}/metrics.jsonl; do sleep 0.05; done; "
        f"mount -o remount,ro {tmp_path} && echo remounted) &"
    )
    result = in_small_tmpfs(tmp_path, "200m", train_command(folder, large_sections, turned))
    output = result.stdout + result.stderr
    assert f"step {STEPS}/{STEPS} | loss" in output, output
    if "remounted" not in output:
        pytest.skip("the mount could not be made read-only while files were open for writing")
    assert "Read-only file system" in output and "status 2" in output, output
