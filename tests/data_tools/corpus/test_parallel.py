"""Check that every item gives one result even if workers die, and that no process remains."""

from __future__ import annotations

import functools
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from data_tools import limits
from data_tools.corpus.parallel import Unfinished, start_server, unordered_map
from data_tools.errors import DataError
from tests.data_tools.conftest import environment

Report = Callable[..., None]


def square(number: int, report: Report) -> int:
    time.sleep(0.01 * (number % 2 == 0))
    report(number, 1)
    return number * number


def die_once(folder: Path, number: int, report: Report) -> int:
    """Kill the process the first time that it gets an even number."""
    first = folder / str(number)
    if number % 2 == 0 and not first.exists():
        first.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def always_die_at_three(number: int, report: Report) -> int:
    if number == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def die_in_the_middle_of_a_message(folder: Path, number: int, report: Report) -> bytes:
    if not (folder / "died").exists():
        (folder / "died").touch()
        for descriptor in range(3, 100):
            try:
                if os.readlink(f"/proc/self/fd/{descriptor}").startswith("socket:"):
                    os.write(descriptor, b"\0\0\1\0half")  # says that 256 bytes follow
            except OSError:
                continue
        os.kill(os.getpid(), signal.SIGKILL)
    return b"x" * 100_000


def interrupt_itself(number: int, report: Report) -> int:
    os.kill(os.getpid(), signal.SIGINT)
    return number


def fail_at_three(number: int, report: Report) -> int:
    if number == 3:
        raise DataError("three is bad")
    return number


def fail_in_another_way(number: int, report: Report) -> int:
    raise ZeroDivisionError(f"number {number}")


def finish_in_a_thread(number: int, report: Report) -> Unfinished[bool]:
    return Unfinished(lambda: threading.current_thread() is not threading.main_thread())


def die_once_while_finishing(folder: Path, number: int, report: Report) -> Unfinished[int]:
    return Unfinished(lambda: die_once(folder, number, report))


def fail_while_finishing_three(number: int, report: Report) -> Unfinished[int]:
    return Unfinished(lambda: fail_at_three(number, report))


def always_die_while_finishing_three(number: int, report: Report) -> Unfinished[int]:
    """Items 0 and 4 do not end, so that one worker always has items 3 and 4."""

    def finish() -> int:
        time.sleep(0.1)  # the parent sends item 4
        return always_die_at_three(number, report)

    if number != 3:
        time.sleep(60)
    return Unfinished(finish)


def ignore(*values: object) -> None:
    pass


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_each_item_gives_its_result_and_its_reports(workers: int) -> None:
    reported = []
    results = sorted(unordered_map(square, range(15), workers, lambda *values: reported.append(values)))
    assert results == [number**2 for number in range(15)]
    assert sorted(reported) == [(number, 1) for number in range(15)]
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("workers", [1, 2])
def test_no_items_no_results(workers: int) -> None:
    assert list(unordered_map(square, [], workers, ignore)) == []


def test_one_worker_is_this_process() -> None:
    def pid(number: int, report: Report) -> int:
        return os.getpid()

    assert list(unordered_map(pid, range(3), 1, ignore)) == [os.getpid()] * 3


def test_closing_ends_the_workers() -> None:
    results = unordered_map(square, range(1000), 2, ignore)
    next(results)
    results.close()
    assert not multiprocessing.active_children()


def test_workers_that_die_are_replaced(tmp_path: Path) -> None:
    work = functools.partial(die_once, tmp_path)
    assert sorted(unordered_map(work, range(6), 2, ignore)) == list(range(6))
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("workers", [1, 2])
def test_a_thread_finishes_the_items(workers: int) -> None:
    assert list(unordered_map(finish_in_a_thread, range(5), workers, ignore)) == [True] * 5


def test_an_item_begins_before_the_last_one_is_finished() -> None:
    begun = [threading.Event() for _ in range(4)]

    def work(number: int, report: Report) -> Unfinished[bool]:
        begun[number].set()
        return Unfinished(lambda: begun[min(number + 1, 3)].wait(60))

    assert list(unordered_map(work, range(4), 1, ignore)) == [True] * 4


def test_items_of_a_worker_that_dies_while_it_finishes_one_are_repeated(tmp_path: Path) -> None:
    work = functools.partial(die_once_while_finishing, tmp_path)
    assert sorted(unordered_map(work, range(6), 2, ignore)) == list(range(6))
    assert not multiprocessing.active_children()


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="finds the pipe in /proc")
def test_a_worker_that_dies_in_the_middle_of_a_message_is_replaced(tmp_path: Path) -> None:
    work = functools.partial(die_in_the_middle_of_a_message, tmp_path)
    assert list(unordered_map(work, range(3), 2, ignore)) == [b"x" * 100_000] * 3


@pytest.mark.parametrize(
    ("work", "items"), [(always_die_at_three, range(10)), (always_die_while_finishing_three, [0, 3, 4])]
)
def test_workers_that_die_again_and_again_at_one_item_end_the_run(
    work: Callable[..., Any], items: Iterable[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error names this item, although a worker begins the next item while it finishes one."""
    monkeypatch.setattr(limits, "_count_kills", lambda: 0)  # the real counter can be that of the machine
    with pytest.raises(DataError) as caught:
        list(unordered_map(work, items, 2, ignore))
    assert str(caught.value).startswith("the worker process died 3 times at 3: it may have been killed, or ")
    assert "\n" not in str(caught.value)
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("work", [fail_at_three, fail_while_finishing_three])
@pytest.mark.parametrize("workers", [1, 2])
def test_an_error_of_the_function_comes_through(workers: int, work: Callable[..., Any]) -> None:
    with pytest.raises(DataError, match="three is bad"):
        list(unordered_map(work, range(10), workers, ignore))
    assert not multiprocessing.active_children()


def test_a_defect_in_a_worker_shows_where_it_was() -> None:
    with pytest.raises(RuntimeError, match=r"(?s)in a worker process:.*fail_in_another_way.*ZeroDivisionError: number"):
        list(unordered_map(fail_in_another_way, range(3), 2, ignore))


def test_workers_leave_ctrl_c_to_their_parent() -> None:
    assert sorted(unordered_map(interrupt_itself, range(6), 2, ignore)) == list(range(6))


IMPORTS_SLOWLY = """
import os, pathlib, signal, time
from data_tools.corpus.parallel import start_server, unordered_map

def work(number, report):
    return number

if __name__ == "__main__":
    signal.signal(signal.SIGINT, lambda *_: None)
    start_server(("imported_slowly",))
    while not pathlib.Path("importing").exists():
        time.sleep(0.01)
    os.killpg(0, signal.SIGINT)  # as Ctrl-C does
    print(sorted(unordered_map(work, range(3), 2, print, ("imported_slowly",))))
"""


def test_ctrl_c_does_not_interrupt_the_imports_of_the_workers(tmp_path: Path) -> None:
    (tmp_path / "parent.py").write_text(IMPORTS_SLOWLY)
    (tmp_path / "imported_slowly.py").write_text(
        "import pathlib, time\npathlib.Path('importing').touch()\ntime.sleep(1)\n"
    )
    result = subprocess.run(
        [sys.executable, "parent.py"],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        start_new_session=True,
        timeout=120,
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "[0, 1, 2]\n", "")


def test_ctrl_c_while_the_server_starts_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []

    def ensure_running() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        events.append("started")

    monkeypatch.setattr("multiprocessing.forkserver.ensure_running", ensure_running)
    before = signal.signal(signal.SIGINT, lambda *_: events.append("interrupted"))
    try:
        start_server(())
    finally:
        signal.signal(signal.SIGINT, before)
    assert sorted(events) == ["interrupted", "started"]  # in any order: another thread may receive the signal


DIES = """
from data_tools.corpus.parallel import unordered_map
from data_tools.errors import DataError

def work(number, report):
    return number

if __name__ == "__main__":
    try:
        list(unordered_map(work, range(3), 2, print, ("dies",)))
    except DataError as error:
        print(error)
"""


def test_the_death_of_the_server_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "parent.py").write_text(DIES)
    (tmp_path / "dies.py").write_text("import os\nos._exit(1)\n")
    command = [sys.executable, "parent.py"]
    ended = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=120)
    assert ended.stdout.startswith("cannot start a worker process: ") and "--workers 1 needs none" in ended.stdout


PARENT = """
import os, time
from data_tools.corpus.parallel import unordered_map

def work(number, report):
    os.write(1, b"%d\\n" % os.getpid())  # print can mix the lines of two workers
    time.sleep(60)  # it does not look at its pipe

if __name__ == "__main__":
    list(unordered_map(work, range(2), 2, print))
"""


BARS = """
from tqdm import tqdm
from data_tools.corpus.parallel import unordered_map

def work(number, report):
    list(tqdm(range(number), disable=False))

if __name__ == "__main__":
    list(unordered_map(work, range(4), 2, print))
"""


def test_a_progress_bar_in_a_worker_leaks_no_semaphore(tmp_path: Path) -> None:
    (tmp_path / "parent.py").write_text(BARS)
    command = [sys.executable, str(tmp_path / "parent.py")]
    ended = subprocess.run(command, env=environment(), capture_output=True, text=True, check=True)
    assert "3/3" in ended.stderr
    assert "leaked" not in ended.stderr


def running(pids: list[int]) -> Iterator[int]:
    for pid in pids:
        try:
            if psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
                yield pid
        except psutil.NoSuchProcess:
            continue


def test_workers_at_work_end_when_their_parent_is_killed(tmp_path: Path) -> None:
    (tmp_path / "parent.py").write_text(PARENT)
    command = [sys.executable, str(tmp_path / "parent.py")]
    with subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        workers = [int(parent.stdout.readline()) for _ in range(2)]
        descendants = [child.pid for child in psutil.Process(parent.pid).children(recursive=True)]
        assert set(workers) <= set(descendants)
        parent.kill()
        deadline_s = time.monotonic() + 10
        while list(running(descendants)) and time.monotonic() < deadline_s:
            time.sleep(0.02)
        assert list(running(descendants)) == []
