"""A damaged checkpoint is found, named and skipped."""

from __future__ import annotations

import errno
import io
import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.checkpoint import verification
from pipeline.checkpoint.manifest import read_manifest
from pipeline.checkpoint.retention import delete_checkpoint
from pipeline.checkpoint.state import read_state
from pipeline.checkpoint.verification import find_damage, locate_checkpoint, newest_good_checkpoint, verify_checkpoints
from pipeline.errors import CheckpointError
from tests.pipeline.checkpoint.conftest import FILES, MANIFEST, MOMENTS, STATE, WEIGHTS, Save, edit_manifest


def truncate(path: Path) -> None:
    content = path.read_bytes()
    if path.name == MANIFEST:
        content = content.rstrip()  # its last byte is a newline, which its own hash does not cover
    path.write_bytes(content[:-1])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def append(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"}")


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x10
    path.write_bytes(content)


def delete(path: Path) -> None:
    path.unlink()


def make_a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def link_to_a_copy(path: Path) -> None:
    """The contents are right, but belong to another file, which may change at any time."""
    elsewhere = path.parent.parent.parent / f"elsewhere_{path.name}"
    path.rename(elsewhere)
    path.symlink_to(elsewhere)


HARMS = {harm.__name__: harm for harm in (truncate, empty, append, flip_a_bit, delete, make_a_folder, link_to_a_copy)}


@pytest.mark.parametrize("harm", HARMS)
@pytest.mark.parametrize("file", FILES)
def test_damage_is_found_and_the_older_one_is_used(
    save: Save, tmp_path: Path, file: str, harm: str, caplog: pytest.LogCaptureFixture
) -> None:
    older, newer = save(2), save(3)
    assert find_damage(newer) is None
    assert newest_good_checkpoint(tmp_path) == newer
    HARMS[harm](newer / file)
    problem = find_damage(newer)
    assert problem is not None and str(newer / file) in problem and "\n" not in problem
    assert find_damage(newer, weights="ema") == problem
    assert find_damage(newer, weights="training") == (None if file == MOMENTS else problem)
    with caplog.at_level(logging.WARNING):
        assert newest_good_checkpoint(tmp_path) == older
    assert str(newer) in caplog.text
    assert locate_checkpoint(tmp_path) == older
    assert locate_checkpoint(tmp_path, weights="training") == (newer if file == MOMENTS else older)
    with pytest.raises(CheckpointError) as caught:
        locate_checkpoint(newer)
    assert str(newer) in str(caught.value) and "\n" not in str(caught.value)


def test_a_link_to_nothing_is_found(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).symlink_to("nowhere")
    assert str(folder / WEIGHTS) in str(find_damage(folder))


def test_a_checkpoint_folder_may_be_a_link(save: Save, tmp_path: Path) -> None:
    """The folder may be a link; the files in it may not."""
    folder = save()
    elsewhere = folder.rename(tmp_path / "elsewhere")
    folder.symlink_to(elsewhere)
    assert find_damage(folder) is None
    assert newest_good_checkpoint(tmp_path) == folder
    delete(elsewhere / WEIGHTS)
    assert find_damage(folder) == f"{folder / WEIGHTS}: missing"


def test_no_bit_of_a_manifest_can_change_unnoticed(folder: Path) -> None:
    path = folder / MANIFEST
    content = path.read_bytes()
    for at in range(0, len(content) - 1, 7):
        path.write_bytes(content[:at] + bytes([content[at] ^ (1 << at % 8)]) + content[at + 1 :])
        problem = find_damage(path.parent)
        assert problem is not None, content[at - 10 : at + 10]
        assert "\n" not in problem
    path.write_bytes(content)
    assert find_damage(path.parent) is None


@pytest.mark.parametrize("file", [name for name in FILES if name != MANIFEST])
def test_no_bit_of_another_file_can_change_unnoticed(folder: Path, file: str) -> None:
    path = folder / file
    content = path.read_bytes()
    for at in range(0, len(content), len(content) // 40):
        path.write_bytes(content[:at] + bytes([content[at] ^ (1 << at % 8)]) + content[at + 1 :])
        assert str(path) in str(find_damage(path.parent)), at


def test_if_all_are_damaged_there_is_no_checkpoint(save: Save, tmp_path: Path) -> None:
    (save() / STATE).unlink()
    assert newest_good_checkpoint(tmp_path) is None
    with pytest.raises(CheckpointError, match="no checkpoint here"):
        locate_checkpoint(tmp_path)


@pytest.mark.parametrize("place", ["nowhere", "a_file", "an_empty_folder"])
def test_a_path_without_checkpoints(tmp_path: Path, place: str) -> None:
    (tmp_path / "a_file").write_text("x")
    (tmp_path / "an_empty_folder").mkdir()
    assert newest_good_checkpoint(tmp_path / place) is None
    with pytest.raises(CheckpointError, match=f"{place}: no checkpoint here"):
        locate_checkpoint(tmp_path / place)


def test_another_format_version_is_refused(folder: Path) -> None:
    edit_manifest(folder, lambda manifest: manifest.update(format_version=3))
    assert "format version 3, this program reads 1 and 2" in str(find_damage(folder))


@pytest.mark.parametrize("key", ["files", "parameters", "optimizer_state"])
@pytest.mark.parametrize("value", [None, [1], "x", {"a": 3}], ids=["none", "list", "text", "object"])
def test_a_malformed_manifest_is_one_line(folder: Path, key: str, value: Any) -> None:
    edit_manifest(folder, lambda manifest: manifest.update({key: value}))
    with pytest.raises(CheckpointError, match=r"manifest\.json: (malformed|'a' is not a file)"):
        read_manifest(folder)
    assert "\n" not in str(find_damage(folder))


def test_a_manifest_of_something_else_is_one_line(folder: Path, corpus: Path) -> None:
    """Token shards have a manifest.json too."""
    with pytest.raises(CheckpointError, match=r"manifest\.json: "):
        locate_checkpoint(corpus)
    (folder / MANIFEST).write_text(json.dumps([1]))
    assert find_damage(folder) == f"{folder / MANIFEST}: expected a JSON object"


def test_a_malformed_state_is_one_line(folder: Path) -> None:
    (folder / STATE).write_text('{"step": 3}')
    with pytest.raises(CheckpointError, match=r"state\.json: malformed"):
        read_state(folder)


def test_a_link_to_a_missing_folder_is_skipped(save: Save, caplog: pytest.LogCaptureFixture) -> None:
    """A user has moved a checkpoint to another disk, which is not mounted now."""
    older, newer = save(step=3), save(step=4)
    newer.rename(newer.with_name("moved"))
    newer.symlink_to(newer.with_name("elsewhere"))
    assert newest_good_checkpoint(older.parent.parent) == older
    (message,) = caplog.messages
    assert message.startswith(f"skipping a damaged checkpoint: {newer / MANIFEST}: cannot be read")


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO, errno.ESTALE])
def test_a_checkpoint_that_cannot_be_read_is_skipped(
    save: Save, tmp_path: Path, number: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The folder ``checkpoints`` can still be listed."""
    older, newer = save(step=3), save(step=4)

    def failing(call: Callable[..., Any]) -> Callable[..., Any]:
        def call_or_fail(path: Any, *arguments: Any, **options: Any) -> Any:
            if not isinstance(path, int) and newer in (Path(path), *Path(path).parents):
                raise OSError(number, os.strerror(number), str(path))
            return call(path, *arguments, **options)

        return call_or_fail

    for module, name in ((os, "lstat"), (os, "stat"), (os, "open"), (io, "open")):
        monkeypatch.setattr(module, name, failing(getattr(module, name)))
    assert newest_good_checkpoint(tmp_path) == older
    (message,) = caplog.messages
    assert message.startswith("skipping a damaged checkpoint") and str(newer) in message and "\n" not in message


def test_a_deleted_checkpoint_that_the_disk_still_lists_is_skipped(
    save: Save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lists of a network disk can be older than its files."""
    listed = [save(step=3), save(step=4)]
    delete_checkpoint(listed[1])
    monkeypatch.setattr(verification, "list_checkpoints", lambda _: list(listed))
    assert newest_good_checkpoint(tmp_path) == listed[0]


def test_a_checkpoint_that_the_run_deletes_is_not_damaged(
    save: Save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    older, newer = save(step=3), save(step=4)
    plain = verification.find_damage

    def delete_and_find(folder: Path) -> str | None:
        if folder == older:
            delete_checkpoint(folder)
        return plain(folder)

    monkeypatch.setattr(verification, "find_damage", delete_and_find)
    lines: list[str] = []
    verify_checkpoints(tmp_path, lines.append)
    assert lines[0].startswith(f"deleted  {older} while it was read") and lines[1] == f"ok       {newer}"
