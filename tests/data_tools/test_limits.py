"""Containers and Slurm limit the memory and the cores of their processes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from data_tools import limits
from data_tools.limits import MemoryKills, available_cores, core_limit, memory_limit
from tests.support.runs import REPOSITORY

MACHINE_BYTES = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
LIMIT_BYTES = 60 << 20


@pytest.fixture
def kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the root of a file tree that replaces ``/proc`` and ``/sys/fs/cgroup``."""
    monkeypatch.setattr(limits, "_PROC", tmp_path / "proc")
    monkeypatch.setattr(limits, "_CGROUPS", tmp_path / "cgroup")
    return tmp_path


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def join_group(kernel: Path, line: str) -> None:
    write(kernel / "proc" / "self" / "cgroup", f"9:name=systemd:/a\n{line}\n")


class TestAvailableMemory:
    def test_without_control_groups(self, kernel: Path) -> None:
        assert memory_limit() == MACHINE_BYTES
        join_group(kernel, "0::/")
        assert memory_limit() == MACHINE_BYTES

    def test_the_smallest_limit_of_the_groups_around_a_slurm_step(self, kernel: Path) -> None:
        join_group(kernel, "0::/system.slice/job_7/step_0")
        for group, limit in (("", "max"), ("/job_7", "1048576"), ("/job_7/step_0", "max")):
            write(kernel / "cgroup" / f"system.slice{group}" / "memory.max", f"{limit}\n")
        assert memory_limit() == 1048576

    def test_version_1(self, kernel: Path) -> None:
        join_group(kernel, "4:memory:/slurm/job_7")
        write(kernel / "cgroup" / "memory" / "memory.limit_in_bytes", "9223372036854771712\n")
        write(kernel / "cgroup" / "memory" / "slurm" / "job_7" / "memory.limit_in_bytes", "2097152\n")
        assert memory_limit() == 2097152

    @pytest.mark.parametrize(
        ("line", "file"), [("0::/docker/4711", "memory.max"), ("4:memory:/docker/4711", "memory/memory.limit_in_bytes")]
    )
    def test_a_container_that_sees_only_its_own_group(self, line: str, file: str, kernel: Path) -> None:
        join_group(kernel, line)
        write(kernel / "cgroup" / file, "3145728\n")
        assert memory_limit() == 3145728


class TestCores:
    @pytest.mark.parametrize(
        ("line", "files", "cores"),
        [
            ("0::/a/b", {"cpu.max": "max 100000", "a/cpu.max": "250000 100000", "a/b/cpu.max": "max 100000"}, 3),
            ("0::/docker/4711", {"cpu.max": "50000 100000"}, 1),
            ("3:cpu,cpuacct:/b", {"cpu/b/cpu.cfs_quota_us": "400000", "cpu/b/cpu.cfs_period_us": "100000"}, 4),
            ("3:cpu,cpuacct:/b", {"cpu/b/cpu.cfs_quota_us": "-1", "cpu/b/cpu.cfs_period_us": "100000"}, None),
            ("0::/", {}, None),
        ],
    )
    def test_the_smallest_limit(
        self, line: str, files: dict[str, str], cores: int | None, kernel: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)), raising=False)
        join_group(kernel, line)
        for name, text in files.items():
            write(kernel / "cgroup" / name, f"{text}\n")
        assert core_limit() == cores
        assert available_cores() == (cores or 64)


class TestMemoryKills:
    @pytest.mark.parametrize(
        ("line", "file"),
        [
            ("0::/job", "cgroup/job/memory.events"),
            ("4:memory:/job", "cgroup/memory/job/memory.oom_control"),
            ("0::/", "proc/vmstat"),
        ],
    )
    def test_only_kills_after_the_start_count(self, line: str, file: str, kernel: Path) -> None:
        join_group(kernel, line)
        write(kernel / "proc" / "vmstat", "oom_kill 5\n")  # of all processes of the machine
        write(kernel / file, "low 0\noom 4\noom_kill 3\noom_group_kill 0\n")
        kills = MemoryKills()
        assert kills.describe() is None
        write(kernel / file, "low 0\noom 7\noom_kill 5\noom_group_kill 0\n")
        text = str(kills.describe())
        assert " has killed 2 processes since the start of this command, because memory was short" in text

    def test_without_counters(self, kernel: Path) -> None:
        assert MemoryKills().describe() is None


@pytest.fixture
def limited_group() -> Iterator[Path]:
    """Return a control group with ``LIMIT_BYTES`` of memory."""
    root = Path("/sys/fs/cgroup")
    version_1 = (root / "memory").is_dir()
    group = (root / "memory" if version_1 else root) / f"gpt2_pipeline_test_{os.getpid()}"
    try:
        group.mkdir()
    except OSError:
        pytest.skip("this machine does not allow new control groups")
    try:
        (group / ("memory.limit_in_bytes" if version_1 else "memory.max")).write_text(str(LIMIT_BYTES))
        without_swap = group / ("memory.memsw.limit_in_bytes" if version_1 else "memory.swap.max")
        if without_swap.exists():  # otherwise, the child would fill the swap first
            without_swap.write_text(str(LIMIT_BYTES) if version_1 else "0")
        yield group
    except OSError:
        pytest.skip("this machine does not allow memory limits")
    finally:
        group.rmdir()


def test_a_child_that_the_kernel_kills(limited_group: Path) -> None:
    child = "x = []\nwhile True: x.append(bytearray(b'1') * (1 << 20))"
    parent = (
        f"import os, subprocess, sys\nopen({str(limited_group / 'cgroup.procs')!r}, 'w').write(str(os.getpid()))\n"
        "from data_tools.limits import MemoryKills, memory_limit\nkills = MemoryKills()\n"
        f"print(memory_limit(), subprocess.run([sys.executable, '-c', {child!r}]).returncode)\nprint(kills.describe())"
    )
    result = subprocess.run([sys.executable, "-c", parent], cwd=REPOSITORY, capture_output=True, text=True, timeout=60)
    numbers, text = result.stdout.splitlines()
    assert numbers == f"{LIMIT_BYTES} -9", result.stderr
    assert "has killed 1 process " in text and text.endswith("(the limit is 62.9 MB)")
