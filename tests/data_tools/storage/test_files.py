"""Hashes of JSON objects."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from data_tools.errors import DataError
from data_tools.storage import files as storage
from data_tools.storage.files import is_writable, require_writable


def test_sha256_of_json_is_that_of_its_values_in_their_order() -> None:
    value = {"b": [1, 2.5, None, "é"], "a": {"x": True}}
    sha256 = storage.sha256_of_json(value)
    assert sha256 == storage.sha256_of_json(json.loads(json.dumps(value, indent=2)))
    assert sha256 != storage.sha256_of_json(dict(reversed(value.items())))
    assert sha256 != storage.sha256_of_json({**value, "b": [1, 2.5, None, "e"]})


def test_what_can_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "file"
    file.touch()
    for path in (tmp_path, file, tmp_path / "new", tmp_path / "new" / "folder"):
        assert is_writable(path)
    assert not is_writable(file / "folder"), "a file is no folder"
    with pytest.raises(DataError, match=f"--out: cannot write {file / 'folder'}; name a place that you may write to"):
        require_writable(file / "folder", "--out")
    with pytest.raises(DataError, match=f"--out: {file} is a file; name a folder"):
        require_writable(file, "--out")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    assert not is_writable(Path("new/folder"))
    assert is_writable(Path("file"))
