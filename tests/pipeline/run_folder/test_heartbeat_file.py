"""``heartbeat.json`` shows the state, the step and the time of a run."""

from __future__ import annotations

import json
import logging
import os
import socket
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest

from pipeline.run_folder import heartbeat_file
from pipeline.run_folder.heartbeat_file import INTERVAL_S, HeartbeatFile, heartbeat_age_s


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def heartbeat(tmp_path: Path, clock: Clock) -> HeartbeatFile:
    return HeartbeatFile(tmp_path, clock)


def content(folder: Path) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((folder / "heartbeat.json").read_text())
    return result


def test_the_file_names_the_process_and_the_time(heartbeat: HeartbeatFile, tmp_path: Path) -> None:
    heartbeat.enter("training", 7)
    written = content(tmp_path)
    age = datetime.now(timezone.utc) - datetime.fromisoformat(written.pop("time"))
    assert timedelta(0) <= age < timedelta(minutes=5)
    assert written == {"state": "training", "step": 7, "host": socket.gethostname(), "pid": os.getpid()}
    assert [path.name for path in tmp_path.iterdir()] == ["heartbeat.json"]


def test_steps_are_written_every_few_seconds_and_states_at_once(
    heartbeat: HeartbeatFile, clock: Clock, tmp_path: Path
) -> None:
    heartbeat.enter("training", 1)
    clock.now += INTERVAL_S / 2
    heartbeat.enter("training", 2)
    assert content(tmp_path)["step"] == 1
    heartbeat.enter("evaluating", 2)
    assert (content(tmp_path)["state"], content(tmp_path)["step"]) == ("evaluating", 2)
    clock.now += INTERVAL_S
    (tmp_path / "heartbeat.json").unlink()
    heartbeat.beat()  # a batch of the evaluation
    assert (content(tmp_path)["state"], content(tmp_path)["step"]) == ("evaluating", 2)


def test_other_ranks_write_nothing(clock: Clock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    heartbeat = HeartbeatFile(None, clock)
    with heartbeat.starting(0):
        heartbeat.enter("training", 1)
    assert not list(tmp_path.iterdir()) and heartbeat_age_s(tmp_path) is None


@pytest.mark.parametrize("before", [None, b'{"state": "interrupted"}\n'])
def test_a_start_that_fails_leaves_the_file_as_it_was(
    before: bytes | None, heartbeat: HeartbeatFile, tmp_path: Path
) -> None:
    path = tmp_path / "heartbeat.json"
    if before:
        path.write_bytes(before)
    with pytest.raises(ValueError, match="wrong"), heartbeat.starting(3):
        assert (content(tmp_path)["state"], content(tmp_path)["step"]) == ("starting", 3)
        raise ValueError("wrong")
    assert (path.read_bytes() if path.exists() else None) == before


def test_a_run_that_fails_later_keeps_its_state(heartbeat: HeartbeatFile, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="wrong"), heartbeat.starting(3):
        heartbeat.enter("training", 3)
        heartbeat.enter("failed", 4)
        raise ValueError("wrong")
    assert (content(tmp_path)["state"], content(tmp_path)["step"]) == ("failed", 4)


def test_a_full_disk_gives_one_warning(
    heartbeat: HeartbeatFile, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(heartbeat_file.os, "replace", fail)
    with caplog.at_level(logging.WARNING):
        heartbeat.enter("training", 1)
        heartbeat.enter("saving", 1)
    assert len(caplog.messages) == 1 and "No space left on device" in caplog.messages[0]


def test_a_file_costs_nothing_between_two_writes(heartbeat: HeartbeatFile, tmp_path: Path) -> None:
    heartbeat.enter("training", 1)
    (tmp_path / "heartbeat.json").unlink()
    for step in range(1000):
        heartbeat.enter("training", step)
    assert not list(tmp_path.iterdir())
