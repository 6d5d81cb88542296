"""A killed build of a C++ extension does not make later runs wait forever."""

from __future__ import annotations

import logging
import os
import threading
import time
from pathlib import Path

import pytest

from pipeline.backends import extension_lock
from pipeline.backends.extension_lock import LONGEST_BUILD_S, clear_dead_lock


@pytest.fixture
def lock(tmp_path: Path) -> Path:
    path = tmp_path / "lock"
    path.touch()
    return path


def age(lock: Path, seconds: float) -> None:
    os.utime(lock, (time.time() - seconds,) * 2)


def test_the_lock_of_a_dead_build_is_removed(
    lock: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    age(lock, LONGEST_BUILD_S + 1)
    monkeypatch.setattr(time, "time", lambda: 0.0)  # the clock of this host is wrong
    with caplog.at_level(logging.WARNING):
        clear_dead_lock(lock)
    assert not lock.exists()
    assert str(lock) in caplog.text


def test_a_build_on_this_host_is_left_alone(lock: Path) -> None:
    age(lock, LONGEST_BUILD_S + 1)
    with lock.open():
        clear_dead_lock(lock)
    assert lock.exists()


def test_a_build_elsewhere_is_waited_for(lock: Path) -> None:
    threading.Timer(1.0, lock.unlink).start()
    started_s = time.monotonic()
    clear_dead_lock(lock)
    assert time.monotonic() - started_s > 0.9


def test_the_lock_of_a_build_elsewhere_is_removed_after_the_limit(lock: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extension_lock, "LONGEST_BUILD_S", 0.7)
    clear_dead_lock(lock)
    assert not lock.exists()


def test_no_lock_is_no_wait(tmp_path: Path) -> None:
    clear_dead_lock(tmp_path / "lock")
