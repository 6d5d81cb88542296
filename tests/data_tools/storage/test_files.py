"""A file is absent, or whole under its name."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from data_tools.errors import DataError
from data_tools.storage import files as storage


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
    content = bytes(range(256)) * 40_000
    assert len(content) > storage._HASH_CHUNK_BYTES
    (tmp_path / "file").write_bytes(content)
    assert storage.sha256_of_file(tmp_path / "file") == hashlib.sha256(content).hexdigest()


def test_sha256_of_an_empty_file(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert storage.sha256_of_file(tmp_path / "file") == hashlib.sha256(b"").hexdigest()


def test_sha256_of_json_is_that_of_its_values_in_their_order() -> None:
    value = {"b": [1, 2.5, None, "é"], "a": {"x": True}}
    sha256 = storage.sha256_of_json(value)
    assert sha256 == storage.sha256_of_json(json.loads(json.dumps(value, indent=2)))
    assert sha256 != storage.sha256_of_json(dict(reversed(value.items())))
    assert sha256 != storage.sha256_of_json({**value, "b": [1, 2.5, None, "e"]})


def test_a_file_that_another_library_wrote_can_be_made_durable(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"content")
    storage.fsync_file(tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == b"content"
    with pytest.raises(FileNotFoundError):
        storage.fsync_file(tmp_path / "missing")


def test_write_errors_become_one_line_with_path_and_reason(tmp_path: Path) -> None:
    path = tmp_path / "missing" / "file"
    with pytest.raises(DataError) as caught, storage.one_line_write_errors(path):
        storage.write_bytes_durably(path, b"")
    assert str(caught.value) == f"cannot write {path}: No such file or directory"
