"""Results in order, little ahead, and no process left behind."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data_tools.errors import DataError
from data_tools.parallel import ordered_map
from tests.data_tools.conftest import environment


def slow_when_even(number: int) -> int:
    time.sleep(0.02 * (number % 2 == 0))
    return number * number


def die_at_three(number: int) -> int:
    if number == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def interrupt_itself(number: int) -> int:
    os.kill(os.getpid(), signal.SIGINT)
    return number


def fail_at_three(number: int) -> int:
    if number == 3:
        raise DataError("three is bad")
    return number


@pytest.mark.parametrize("workers", [1, 2])
def test_results_come_in_the_order_of_the_items(workers: int) -> None:
    assert list(ordered_map(slow_when_even, range(20), workers)) == [number**2 for number in range(20)]


@pytest.mark.parametrize("workers", [1, 2])
def test_an_endless_source_is_read_only_a_little_ahead(workers: int) -> None:
    taken = itertools.count()
    results = ordered_map(slow_when_even, taken, workers)
    assert [next(results) for _ in range(5)] == [0, 1, 4, 9, 16]
    results.close()
    assert not multiprocessing.active_children()
    assert next(taken) <= 5 + 4 * workers


def test_a_worker_that_dies_is_one_line() -> None:
    with pytest.raises(DataError, match="one of the 2 worker processes died"):
        list(ordered_map(die_at_three, range(10), 2))


@pytest.mark.parametrize("workers", [1, 2])
def test_an_error_of_the_function_comes_through(workers: int) -> None:
    with pytest.raises(DataError, match="three is bad"):
        list(ordered_map(fail_at_three, range(10), workers))


def test_workers_leave_ctrl_c_to_their_parent() -> None:
    assert list(ordered_map(interrupt_itself, range(6), 2)) == list(range(6))


PARENT = """
import os, time
from data_tools.parallel import ordered_map

def pid_of_worker(item):
    return os.getpid()

if __name__ == "__main__":
    results = ordered_map(pid_of_worker, range(100), 2)
    print(next(results), flush=True)
    time.sleep(60)
"""


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    with open(f"/proc/{pid}/stat") as file:
        return file.read().rsplit(")", 1)[1].split()[0] != "Z"


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="reads process states from /proc")
def test_workers_end_when_their_parent_is_killed(tmp_path: Path) -> None:
    script = f"{tmp_path}/parent.py"
    with open(script, "w") as file:
        file.write(PARENT)
    with subprocess.Popen([sys.executable, script], env=environment(), stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        worker = int(parent.stdout.readline())
        assert is_running(worker)
        parent.kill()
    deadline_s = time.monotonic() + 10
    while is_running(worker) and time.monotonic() < deadline_s:
        time.sleep(0.05)
    assert not is_running(worker)
