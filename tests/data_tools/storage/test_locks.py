"""A folder has one exclusive writer, or several that share it; the last of those knows that it is the last."""

from __future__ import annotations

import errno
import multiprocessing
import os
import threading
import time
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from data_tools.errors import DataError
from data_tools.storage.locks import lock_folder

REFUSAL = "is being written by another process; wait for it or end it"


@pytest.mark.parametrize("shared", [False, True])
def test_an_exclusive_holder_is_the_only_one(tmp_path: Path, shared: bool) -> None:
    refused = pytest.raises(DataError, match=REFUSAL)
    with lock_folder(tmp_path, shared=False), refused, lock_folder(tmp_path, shared=shared):
        pass
    with lock_folder(tmp_path, shared=shared):
        pass


def test_several_processes_share(tmp_path: Path) -> None:
    with lock_folder(tmp_path, shared=True), lock_folder(tmp_path, shared=True):
        with pytest.raises(DataError, match=REFUSAL), lock_folder(tmp_path, shared=False):
            pass
        with lock_folder(tmp_path, shared=True):
            pass
    with lock_folder(tmp_path, shared=False):
        pass


def test_the_last_holder_removes_the_file(tmp_path: Path) -> None:
    with lock_folder(tmp_path, shared=False):
        pass
    with lock_folder(tmp_path, shared=True), lock_folder(tmp_path, shared=True):
        assert len(list(tmp_path.iterdir())) == 1
    assert list(tmp_path.iterdir()) == []


def test_only_the_last_of_several_becomes_exclusive(tmp_path: Path) -> None:
    with lock_folder(tmp_path, shared=True) as first, lock_folder(tmp_path, shared=True) as second:
        assert not first.make_exclusive()
        assert second.make_exclusive()
        with pytest.raises(DataError, match=REFUSAL), lock_folder(tmp_path, shared=False):
            pass


def test_a_shared_lock_waits_for_one_that_became_exclusive(tmp_path: Path) -> None:
    held = threading.Event()

    def share() -> None:
        with lock_folder(tmp_path, shared=True):
            held.set()

    with lock_folder(tmp_path, shared=True) as lock:
        assert lock.make_exclusive()
        waiting = threading.Thread(target=share)
        waiting.start()
        assert not held.wait(0.2)
    waiting.join(10)
    assert held.is_set()


def hold(folder: Path, shared: bool, connection: Connection) -> None:
    with lock_folder(folder, shared=shared):
        connection.send("held")
        time.sleep(60)


@pytest.mark.parametrize("shared", [False, True])
def test_the_lock_of_a_killed_process_is_released(tmp_path: Path, shared: bool) -> None:
    context = multiprocessing.get_context("forkserver")
    ours, theirs = context.Pipe()
    process = context.Process(target=hold, args=(tmp_path, shared, theirs))
    process.start()
    assert ours.recv() == "held"
    with pytest.raises(DataError, match=REFUSAL), lock_folder(tmp_path, shared=False):
        pass
    process.kill()
    process.join()
    for again in (True, False):
        with lock_folder(tmp_path, shared=again):
            pass
    assert list(tmp_path.iterdir()) == []


def test_never_two_holders_although_each_removes_the_file(tmp_path: Path) -> None:
    """Several threads lock the folder in turn, and each removes the lock file."""
    inside, most, errors = 0, 0, []

    def take_turns() -> None:
        nonlocal inside, most
        for _ in range(100):
            try:
                with lock_folder(tmp_path, shared=False):
                    inside += 1
                    time.sleep(0.0002)
                    most = max(most, inside)
                    inside -= 1
            except DataError:
                pass
            except Exception as error:  # noqa: BLE001 (any other error fails the test)
                errors.append(error)

    threads = [threading.Thread(target=take_turns) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert most == 1
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    message = f"cannot write {tmp_path}/none/writing.lock: No such file"
    with pytest.raises(DataError, match=message), lock_folder(tmp_path / "none", shared=False):
        pass


def test_a_lock_that_cannot_be_written_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", refuse)
    with pytest.raises(DataError, match="writing.lock: No space left"), lock_folder(tmp_path, shared=False):
        pass
    assert list(tmp_path.iterdir()) == []
