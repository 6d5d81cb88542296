"""The ranks of a host use separate cores unless the user or the launcher decides otherwise; freed memory is reused."""

from __future__ import annotations

import ctypes
import os
import resource
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.distributed import cpu
from pipeline.distributed.cpu import share_cores, split_cores
from pipeline.distributed.world import World
from tests.support.runs import run_ranks


@pytest.fixture
def bound(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """Record the calls that would bind this process to cores."""
    asked: list[list[int]] = []
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(cpu, "core_limit", lambda: None)  # this machine may have a limit
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    monkeypatch.setattr(os, "sched_setaffinity", lambda pid, share: asked.append(list(share)), raising=False)
    return asked


class Hosts(World):
    """One rank of ``OFFERED``."""

    def gather(self, item: Any) -> list[Any]:
        assert item == OFFERED[self.rank]
        return OFFERED


#: Each rank's local rank and usable cores: a host of 3 ranks on 8 shared cores, a host of 2 ranks that a launcher has
#: bound, and a host of a single rank.
SHARED = [0, 1, 2, 3, 4, 5, 6, 7]
OFFERED = [(0, SHARED), (1, SHARED), (2, SHARED), (0, [0, 1]), (1, [2, 3]), (0, [0, 1, 2])]


@pytest.mark.parametrize(
    ("rank", "threads", "cores_of_rank"),
    [(0, 2, [0, 1]), (1, 3, [2, 3, 4]), (2, 3, [5, 6, 7]), (3, 2, None), (4, 2, None), (5, 3, None)],
)
def test_the_ranks_of_a_host_split_its_cores(
    monkeypatch: pytest.MonkeyPatch,
    bound: list[list[int]],
    rank: int,
    threads: int,
    cores_of_rank: list[int] | None,
) -> None:
    local_rank, usable = OFFERED[rank]
    monkeypatch.setattr(cpu, "_usable_cores", lambda: usable)
    world = Hosts(rank, len(OFFERED), local_rank, torch.device("cpu"))
    cores = f", bound to cores {', '.join(map(str, cores_of_rank))}" if cores_of_rank else ""
    assert share_cores(world) == f"{threads} per process{cores}"
    assert bound == ([cores_of_rank] if cores_of_rank else [])


@pytest.mark.parametrize(
    ("rank", "limit", "threads"), [(0, 3, 1), (1, 3, 1), (2, 6, 2), (1, 2, 1), (5, 2, 2), (5, 8, 3)]
)
def test_a_limit_of_the_container_means_fewer_threads(
    monkeypatch: pytest.MonkeyPatch, bound: list[list[int]], rank: int, limit: int, threads: int
) -> None:
    local_rank, usable = OFFERED[rank]
    monkeypatch.setattr(cpu, "_usable_cores", lambda: usable)
    monkeypatch.setattr(cpu, "core_limit", lambda: limit)
    line = share_cores(Hosts(rank, len(OFFERED), local_rank, torch.device("cpu")))
    reason = f" (the container or job may use {limit} cores)"
    assert line.startswith(f"{threads} per process{reason if limit < 8 else ''}")


@pytest.mark.parametrize(
    ("requested", "line"), [("2", "2 per process"), ("100000", "3 per process (OMP_NUM_THREADS is 100,000)")]
)
def test_the_user_chooses_the_number_of_threads(
    world: World, monkeypatch: pytest.MonkeyPatch, bound: list[list[int]], requested: str, line: str
) -> None:
    """OpenMP crashes if it cannot start all threads."""
    monkeypatch.setenv("OMP_NUM_THREADS", requested)
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    monkeypatch.setattr(cpu, "_usable_cores", lambda: [0, 1, 2])
    assert share_cores(world) == line
    assert os.environ["OMP_NUM_THREADS"] == line[0]
    assert not bound


@pytest.mark.parametrize(("rank", "threads"), [(0, 2), (1, 3), (2, 3), (3, 2), (5, 3)])
def test_ranks_with_gpus_get_threads_for_offloaded_state_and_are_not_bound(
    monkeypatch: pytest.MonkeyPatch, bound: list[list[int]], rank: int, threads: int
) -> None:
    """Under torchrun, which sets OMP_NUM_THREADS=1, and under deepspeed, which sets nothing."""
    local_rank, usable = OFFERED[rank]
    monkeypatch.setattr(cpu, "_usable_cores", lambda: usable)
    set_threads: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", set_threads.append)
    for launcher in ({"OMP_NUM_THREADS": "1", "TORCHELASTIC_RUN_ID": "x"}, {}):
        monkeypatch.setenv("WORLD_SIZE", str(len(OFFERED)))
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        for name, value in launcher.items():
            monkeypatch.setenv(name, value)
        world = Hosts(rank, len(OFFERED), local_rank, torch.device("cuda", local_rank))
        assert share_cores(world) == f"{threads} per process"
        assert os.environ["OMP_NUM_THREADS"] == str(threads)
    assert set_threads == [threads, threads]
    assert bound == []


#: Loads a copy of torch's OpenMP library, which is a second OpenMP in the process, as in torch's builds for CUDA.
OPENMP_PROGRAM = """
import ctypes, shutil, sys
from pathlib import Path
import torch
from pipeline.distributed.environment import set_openmp_threads

torch.set_num_threads(5)
if sys.argv[2] == "set":
    set_openmp_threads(5)
library = next((Path(torch.__file__).parent / "lib").glob("libgomp*"))
copy = shutil.copy(library, Path(sys.argv[1]) / "copy_of_openmp.so")
print(ctypes.CDLL(copy).omp_get_max_threads())
"""


@pytest.mark.skipif(
    not list((Path(torch.__file__).parent / "lib").glob("libgomp*")), reason="torch uses the OpenMP of the system"
)
@pytest.mark.parametrize(("how", "threads"), [("set", "5"), ("not set", "1")])
def test_an_openmp_that_is_loaded_later_gets_the_same_threads(tmp_path: Path, how: str, threads: str) -> None:
    program = tmp_path / "openmp.py"
    program.write_text(OPENMP_PROGRAM)
    result = run_ranks(1, program, [str(tmp_path), how])
    assert result.stdout.strip() == threads, result.stderr


@pytest.mark.parametrize(
    ("usable", "ranks", "shares"),
    [([4, 5, 6, 7], 2, [[4, 5], [6, 7]]), ([0, 1, 2], 2, [[0], [1, 2]]), ([0, 1], 3, [[0], [1], [0]])],
)
def test_split_cores(usable: Sequence[int], ranks: int, shares: list[list[int]]) -> None:
    assert [list(split_cores(usable, rank, ranks)) for rank in range(ranks)] == shares


#: Allocates, fills and frees blocks as torch does, then prints the page faults of the last twenty. The first twenty are
#: not counted: a thread sets aside the seven odd ends of aligned blocks, and each moves the next block.
PROGRAM = """
import ctypes, resource, sys
from pipeline.distributed.cpu import keep_freed_memory

if sys.argv[1] == "kept":
    keep_freed_memory()
libc, block, size = ctypes.CDLL(None), ctypes.c_void_p(), 48 << 20
for i in range(40):
    if i == 20:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    assert libc.posix_memalign(ctypes.byref(block), ctypes.c_size_t(64), ctypes.c_size_t(size)) == 0
    ctypes.memset(block.value, 1, size)
    libc.free(block)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def page_faults(program: Path, how: str) -> int:
    return int(run_ranks(1, program, [how]).stdout)


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="needs glibc")
def test_freed_memory_is_reused(tmp_path: Path) -> None:
    program = tmp_path / "blocks.py"
    program.write_text(PROGRAM)
    pages_of_twenty_blocks = 20 * (48 << 20) // resource.getpagesize()
    assert page_faults(program, "returned") > 0.9 * pages_of_twenty_blocks
    assert page_faults(program, "kept") < 0.1 * pages_of_twenty_blocks
