"""A file or folder is absent, or complete under its name."""

from __future__ import annotations

import errno
import gc
import json
import os
from pathlib import Path

import pytest

from data_tools.errors import DataError, one_line_write_errors
from data_tools.storage import atomic as storage


def test_json_is_written_and_nothing_else_is_left(tmp_path: Path) -> None:
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


def test_a_file_that_another_library_wrote_can_be_made_durable(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"content")
    storage.fsync_file(tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == b"content"
    with pytest.raises(FileNotFoundError):
        storage.fsync_file(tmp_path / "missing")


def test_write_errors_become_one_line_with_path_and_reason(tmp_path: Path) -> None:
    path = tmp_path / "missing" / "file"
    with pytest.raises(DataError) as caught, one_line_write_errors(path):
        storage.write_bytes_durably(path, b"")
    assert str(caught.value) == f"cannot write {path}: No such file or directory"


def test_the_error_of_a_full_disk_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(OSError, match="No space left") as caught:
        storage.write_bytes_durably(tmp_path / "file", b"content")
    assert caught.value.filename == str(tmp_path / "file")


def test_a_file_has_its_name_only_after_the_block(tmp_path: Path) -> None:
    path = tmp_path / "value"
    with storage.atomic_file(path) as file:
        file.write(b"content")
        assert not path.exists()
        assert [file.name for file in tmp_path.iterdir()] == ["value.partial"]
    assert path.read_bytes() == b"content"
    assert list(tmp_path.iterdir()) == [path]


def test_a_block_that_never_ends_leaves_the_file_to_the_next_writer(tmp_path: Path) -> None:
    abandoned = storage.atomic_file(tmp_path / "value")
    abandoned.__enter__().write(b"old")
    with storage.atomic_file(tmp_path / "value") as file:
        del abandoned
        gc.collect()
        file.write(b"new")
    assert (tmp_path / "value").read_bytes() == b"new"


def test_a_file_can_be_written_in_another_folder(tmp_path: Path) -> None:
    (tmp_path / "scratch").mkdir()
    with storage.atomic_file(tmp_path / "value", aside=tmp_path / "scratch" / "value") as file:
        file.write(b"content")
        assert (tmp_path / "scratch" / "value").exists()
    assert (tmp_path / "value").read_bytes() == b"content"
    assert not list((tmp_path / "scratch").iterdir())


def test_a_folder_has_its_name_only_after_the_block(tmp_path: Path) -> None:
    target = tmp_path / "new" / "out"
    with storage.atomic_folder(target) as folder:
        (folder / "file").write_bytes(b"content")
        (folder / "inner").mkdir()
        (folder / "inner" / "file").write_bytes(b"inner")
        assert [path.name for path in target.parent.iterdir()] == [".out.partial"]
    assert (target / "file").read_bytes() == b"content"
    assert (target / "inner" / "file").read_bytes() == b"inner"
    assert list(target.parent.iterdir()) == [target]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_leaves_neither_the_folder_nor_its_aside_path(tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error), storage.atomic_folder(tmp_path / "out") as folder:
        (folder / "file").write_bytes(b"content")
        raise error
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("aside", [None, "visible.partial"])
def test_a_leftover_of_a_killed_process_is_emptied(tmp_path: Path, aside: str | None) -> None:
    leftover = tmp_path / (aside or ".out.partial")
    (leftover / "inner").mkdir(parents=True)
    (leftover / "inner" / "old").write_bytes(b"old")
    (leftover / "link").symlink_to(tmp_path / "elsewhere")
    with storage.atomic_folder(tmp_path / "out", aside=tmp_path / aside if aside else None) as folder:
        assert folder == leftover and not list(folder.iterdir())
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]


def test_a_folder_that_another_writes_is_refused_and_left_alone(tmp_path: Path) -> None:
    with storage.atomic_folder(tmp_path / "out") as folder:
        (folder / "file").write_bytes(b"content")
        with (
            pytest.raises(
                DataError, match=r"\.out\.partial is being written by another process; wait for it or end it"
            ),
            storage.atomic_folder(tmp_path / "out"),
        ):
            pass
    assert (tmp_path / "out" / "file").read_bytes() == b"content"


def test_a_folder_with_content_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    with pytest.raises(OSError, match="not empty"), storage.atomic_folder(tmp_path / "out"):
        pass
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "mine"]


def test_publishing_a_folder_fsyncs_all_files_before_the_rename(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    aside = tmp_path / ".out.partial"
    storage.make_empty_folder(aside)
    (aside / "inner").mkdir()
    for name in ("file", "inner/file"):
        (aside / name).write_bytes(b"content")
    events: list[Path] = []
    replace = storage.os.replace
    monkeypatch.setattr(storage, "fsync_file", events.append)
    monkeypatch.setattr(storage, "fsync_folder", events.append)
    monkeypatch.setattr(storage.os, "replace", lambda old, new: (events.append(new), replace(old, new)))
    storage.publish_folder(aside, tmp_path / "out")
    assert events == [aside / "file", aside, aside / "inner" / "file", aside / "inner", tmp_path / "out", tmp_path]


def test_a_file_in_the_way_of_a_folder_is_an_error(tmp_path: Path) -> None:
    (tmp_path / ".out.partial").write_text("a file where a folder should be")
    with pytest.raises(FileExistsError):
        storage.make_empty_folder(tmp_path / ".out.partial")
    assert (tmp_path / ".out.partial").is_file()
