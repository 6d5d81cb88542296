"""Which paths count as writable, before anything is written."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from data_tools.errors import DataError
from data_tools.storage.files import is_writable, require_writable


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
