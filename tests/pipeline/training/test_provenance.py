"""The record of a start names the command, the host, the packages and the commit of the working folder."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pipeline.training.provenance import describe_commit, describe_process, describe_program


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=test", "-c", "user.email=test@localhost"]
    command = ["git", *identity, *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout.strip()


def test_the_commit_and_whether_tracked_files_were_changed(tmp_path: Path) -> None:
    assert describe_commit(tmp_path) is None
    git(tmp_path, "init", "--quiet")
    assert describe_commit(tmp_path) is None, "there is no commit yet"
    (tmp_path / "code.py").write_text("1\n")
    git(tmp_path, "add", "code.py")
    git(tmp_path, "commit", "--quiet", "-m", "first")
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "metrics.jsonl").write_text("{}\n")
    expected = {"commit": git(tmp_path, "rev-parse", "HEAD"), "dirty": False}
    assert describe_commit(tmp_path / "runs") == expected, "an untracked run folder is no change of the program"
    (tmp_path / "code.py").write_text("2\n")
    assert describe_commit(tmp_path) == {**expected, "dirty": True}


def test_without_git_there_is_no_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert describe_commit(tmp_path) is None


def test_the_process_is_described(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "executable", "/usr/bin/python3")
    monkeypatch.setattr(sys, "orig_argv", ["/usr/bin/python3", "launch/train.py", "--config", "a file.json"])
    found = json.loads(json.dumps(describe_process()))
    assert found["host"] == socket.gethostname()
    assert found["packages"]["torch"].partition("+")[0] == torch.__version__.partition("+")[0]
    assert found["command"] == "python3 launch/train.py --config 'a file.json'"
    assert found["git"] is None and found["launcher"] is None
    assert len(found["program"]["source_sha256"]) == 64


def test_the_code_of_the_program_is_identified(tmp_path: Path) -> None:
    """An installed program is not in the user's repository, even if the folder of its packages is."""
    copy = tmp_path / "pipeline" / "training" / "provenance.py"
    copy.parent.mkdir(parents=True)
    copy.write_text("1\n")
    (tmp_path / "mine.py").write_text("1\n")
    git(tmp_path, "init", "--quiet")
    git(tmp_path, "add", "mine.py")
    git(tmp_path, "commit", "--quiet", "-m", "without the program")
    installed = describe_program(tmp_path)
    assert installed.keys() == {"source_sha256"}
    git(tmp_path, "add", "pipeline")
    git(tmp_path, "commit", "--quiet", "-m", "with the program")
    assert describe_program(tmp_path) == {**installed, "commit": git(tmp_path, "rev-parse", "HEAD"), "dirty": False}
    copy.write_text("2\n")
    changed = describe_program(tmp_path)
    assert changed["dirty"] and changed["source_sha256"] != installed["source_sha256"]
