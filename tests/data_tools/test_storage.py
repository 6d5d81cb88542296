"""A file is absent, or whole under its name."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from data_tools import storage
from data_tools.errors import DataError


def test_json_is_whole_and_alone_in_its_folder(tmp_path: Path) -> None:
    path = tmp_path / "value.json"
    storage.write_json_durably(path, {"b": 1, "a": ["é"]})
    storage.write_json_durably(path, {"b": 2, "a": ["é"]})
    assert json.loads(path.read_text()) == {"b": 2, "a": ["é"]}
    assert path.read_bytes().endswith(b"}\n")
    assert list(tmp_path.iterdir()) == [path]


def test_a_failed_write_leaves_the_old_file_and_no_temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "value"
    storage.write_bytes_durably(path, b"old")

    def refuse(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(storage.os, "fsync", refuse)
    with pytest.raises(OSError, match="No space left"):
        storage.write_bytes_durably(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_sha256_of_a_file_longer_than_one_read(tmp_path: Path) -> None:
    content = bytes(range(256)) * 10_000
    (tmp_path / "file").write_bytes(content)
    assert storage.sha256_of_file(tmp_path / "file") == hashlib.sha256(content).hexdigest()


def test_write_errors_become_one_line_with_path_and_reason(tmp_path: Path) -> None:
    path = tmp_path / "missing" / "file"
    with pytest.raises(DataError) as caught, storage.one_line_write_errors(path):
        storage.write_bytes_durably(path, b"")
    assert str(caught.value) == f"cannot write {path}: No such file or directory"
