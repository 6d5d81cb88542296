"""Hashes of files, in this process and in a second one."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from data_tools.storage import sha256
from data_tools.storage.sha256 import sha256_of_file, start_hashing


def test_sha256_of_a_file_longer_than_one_read(tmp_path: Path) -> None:
    content = bytes(range(256)) * 40_000
    assert len(content) > sha256._READ_BYTES
    (tmp_path / "file").write_bytes(content)
    assert sha256_of_file(tmp_path / "file") == hashlib.sha256(content).hexdigest()


def test_sha256_of_an_empty_file(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert sha256_of_file(tmp_path / "file") == hashlib.sha256(b"").hexdigest()


def test_a_second_process_prints_hashes_up_to_the_first_file_that_it_cannot_read(tmp_path: Path) -> None:
    for name in ("-a", "b c", "d"):
        (tmp_path / name).write_text(name)
    paths = [tmp_path / name for name in ("b c", "-a", "missing", "d")]
    output, _ = start_hashing(paths, 2).communicate()
    assert output.split() == [sha256_of_file(path) for path in paths[:2]]


def test_the_second_process_ends_when_the_first_one_has_died(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("text")
    parents = iter([100, 1])
    monkeypatch.setattr(os, "getppid", lambda: next(parents))
    monkeypatch.setattr(os, "nice", lambda increment: increment)
    with pytest.raises(SystemExit, match="has ended"):
        sha256._print_hashes(1, [tmp_path / "file"])
