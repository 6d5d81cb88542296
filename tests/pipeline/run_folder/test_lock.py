"""One run writes into a run folder at a time; a killed one releases it."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import Mock

import pytest

from data_tools.errors import DataError
from pipeline.checkpoint.conversion import require_new_run_folder
from pipeline.config.loading import dump_config
from pipeline.config.schema import Config
from pipeline.errors import CheckpointError, ConfigError
from pipeline.run_folder.layout import LOCK_FILE
from pipeline.run_folder.lock import lock_run_folder, open_run_folder, why_not_a_run_folder
from tests.support.runs import child_environment

HOLD = """
import sys
from pathlib import Path
from pipeline.run_folder.lock import lock_run_folder
with lock_run_folder(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""
#: Acquires and releases the lock repeatedly; a file created while it is held must not exist already.
CONTEND = """
import os, sys, time
from pathlib import Path
from pipeline.errors import ConfigError
from pipeline.run_folder.lock import lock_run_folder
folder, held = Path(sys.argv[1]), 0
until = time.monotonic() + 60
while held < 100 and time.monotonic() < until:
    try:
        with lock_run_folder(folder):
            os.close(os.open(folder / "inside", os.O_CREAT | os.O_EXCL))
            (folder / "inside").unlink()
            held += 1
    except ConfigError:
        pass
sys.exit(held != 100)
"""


def start(script: str, folder: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", script, str(folder)],
        env=child_environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


@contextmanager
def other_run(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the folder."""
    with start(HOLD, folder) as process:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        try:
            yield process
        finally:
            process.kill()


def is_free(folder: Path) -> bool:
    with lock_run_folder(folder):
        return True


def test_a_second_run_is_refused_and_the_first_is_named(tmp_path: Path) -> None:
    with other_run(tmp_path) as process:
        for _ in range(2):
            with pytest.raises(ConfigError) as caught, lock_run_folder(tmp_path):
                pytest.fail("two runs hold the folder")
            line = str(caught.value)
            assert line.startswith(f"run.out_dir: {tmp_path} is in use by another run")
            assert f"({socket.gethostname()}, pid {process.pid})" in line and "\n" not in line


def test_within_one_process_too(tmp_path: Path) -> None:
    with lock_run_folder(tmp_path):
        with pytest.raises(ConfigError, match=f"pid {os.getpid()}"), lock_run_folder(tmp_path):
            pass
        assert (tmp_path / LOCK_FILE).exists()
    assert is_free(tmp_path)


def test_other_folders_are_free(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    with other_run(tmp_path):
        assert is_free(tmp_path / "other")


def test_a_killed_run_releases_the_lock(tmp_path: Path) -> None:
    with other_run(tmp_path) as process:
        process.send_signal(signal.SIGKILL)
        assert process.wait(30) == -signal.SIGKILL
        assert (tmp_path / LOCK_FILE).exists()
        assert is_free(tmp_path)
    assert not (tmp_path / LOCK_FILE).exists()


def test_after_a_clean_end_the_file_is_gone(tmp_path: Path) -> None:
    with other_run(tmp_path) as process:
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait(30) == 0
    assert list(tmp_path.iterdir()) == []


def test_after_an_error_the_file_is_gone(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="training failed"), lock_run_folder(tmp_path):
        raise RuntimeError("training failed")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.pwrite", fail)
    with pytest.raises(DataError, match=f"cannot write .*{LOCK_FILE}: No space left"), lock_run_folder(tmp_path):
        pass


GARBAGE = {
    "nothing": b"",
    "no JSON": b"{",
    "no text": b"\xff\0",
    "an object": b"{}",
    "a list": b"[1]",
    "a number": b"7",
    "null": b"null",
    "another host": b'{"host": "elsewhere", "pid": 1}',
}


@pytest.mark.parametrize("content", list(GARBAGE))
def test_a_file_that_a_crash_left_is_overwritten(tmp_path: Path, content: str) -> None:
    (tmp_path / LOCK_FILE).write_bytes(GARBAGE[content])
    with lock_run_folder(tmp_path):
        assert f'"pid": {os.getpid()}' in (tmp_path / LOCK_FILE).read_text()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "content",
    [name for name in GARBAGE if name != "another host"],
)
def test_a_holder_that_has_not_written_its_name_yet(tmp_path: Path, content: str) -> None:
    """It has locked an old file, and has not written its name yet."""
    path = tmp_path / LOCK_FILE
    path.write_bytes(GARBAGE[content])
    with path.open("rb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(ConfigError, match=r"in use by another run \(unknown\)"), lock_run_folder(tmp_path):
            pass


def test_many_contenders_hold_it_one_at_a_time(tmp_path: Path) -> None:
    processes = [start(CONTEND, tmp_path) for _ in range(3)]
    for process in processes:
        process.communicate(timeout=90)
    assert [process.returncode for process in processes] == [0, 0, 0]
    assert list(tmp_path.iterdir()) == []


def test_a_new_folder_is_created(tmp_path: Path) -> None:
    for _ in range(2):
        with open_run_folder(tmp_path / "new" / "run"):
            assert (tmp_path / "new" / "run" / LOCK_FILE).exists()


@pytest.mark.parametrize("inside", ["checkpoints", "checkpoints/step_00000010"])
def test_the_checkpoints_of_another_run_are_refused(tmp_path: Path, inside: str) -> None:
    (tmp_path / "config.json").write_text("{}")
    with (
        pytest.raises(ConfigError, match=f"is inside the checkpoints of the run {tmp_path}"),
        open_run_folder(tmp_path / inside),
    ):
        pass
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.parametrize(
    ("place", "content", "reason"),
    [
        ("/", {}, "is the home folder .*, or contains it"),
        ("home", {}, "is the home folder .*home, or contains it"),
        (".", {}, "is the home folder .*home, or contains it"),
        ("data", {"manifest.json": "{}"}, "holds token shards or a checkpoint"),
        ("model", {"config.json": '{"model_type": "gpt2"}'}, "holds the config.json of another program"),
    ],
)
def test_a_folder_of_other_things_is_refused_and_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, content: dict[str, str], reason: str
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    folder = tmp_path / place  # "/" stays "/"
    for name, text in content.items():
        folder.mkdir()
        (folder / name).write_text(text)
    with pytest.raises(ConfigError, match=f"run.out_dir: .*{reason}.*; name a folder"), open_run_folder(folder):
        pass
    assert place == "/" or [path.name for path in folder.glob("*")] == list(content)
    with pytest.raises(CheckpointError, match=f"--out: .*{reason}.*; name a folder"):
        require_new_run_folder(folder)


def test_a_user_without_a_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For example, a container runs with any user id."""
    monkeypatch.setattr(Path, "home", Mock(side_effect=RuntimeError("Could not determine home directory.")))
    assert why_not_a_run_folder(tmp_path) is None


def test_a_folder_that_cannot_be_read_is_named_as_such(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "exists", Mock(side_effect=PermissionError(13, "Permission denied")))
    assert why_not_a_run_folder(tmp_path / "below") is None, "the error about the folder comes later"


def test_a_folder_with_the_config_of_a_run_is_a_run_folder(tmp_path: Path) -> None:
    for content in (json.dumps(dump_config(Config())), "damaged"):
        (tmp_path / "config.json").write_text(content)
        with open_run_folder(tmp_path):
            pass


def test_a_folder_that_cannot_be_created_is_a_one_line_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to("unmounted")
    is_broken = f"{tmp_path / 'link'} is a link to unmounted, which does not exist)"
    for name, reason in (("file", ""), ("file/run", ""), ("link", is_broken), ("link/run", is_broken)):
        place = tmp_path / name
        with pytest.raises(ConfigError) as caught, open_run_folder(place):
            pass
        assert str(caught.value).startswith(f"run.out_dir: cannot make {place} ({reason}")
        assert "\n" not in str(caught.value)
