"""A folder on the disk and one at a URL behave alike: files appear complete or not at all."""

from __future__ import annotations

import errno
import os
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest

from data_tools.errors import DataError
from data_tools.sources.files import find_files
from data_tools.storage import remote
from data_tools.storage.folders import Folder, LocalFolder, RemoteFolder, open_folder, scratch_of
from tests.data_tools.conftest import states


@pytest.fixture(params=["local", "remote"])
def folder(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Folder]:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    if request.param == "local":
        (tmp_path / "out").mkdir()
        yield open_folder(tmp_path / "out")
        return
    yield open_folder("memory://bucket/out/")
    files = fsspec.filesystem("memory")
    if files.exists("/bucket"):
        files.rm("/bucket", recursive=True)


def test_a_place_is_a_path_or_a_url(tmp_path: Path) -> None:
    assert isinstance(open_folder(tmp_path), LocalFolder)
    assert isinstance(open_folder(str(tmp_path)), LocalFolder)
    assert isinstance(open_folder("memory://bucket/out"), RemoteFolder)
    with pytest.raises(DataError, match=r"cannot use nosuch://bucket: .*nosuch"):
        open_folder("nosuch://bucket")


@pytest.mark.parametrize("url", ["s3://bucket/run", "file:///folder/run", "memory://bucket/run", "hf://datasets/a/b"])
def test_files_can_be_written_at_a_url(url: str) -> None:
    remote.require_writable_url(url, "--out")


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("https://host/run", "files at https:// can only be read; name a URL such as s3://bucket/folder"),
        ("zip://a.zip", "files at zip:// can only be read; name a URL"),
        ("simplecache::s3://bucket/run", "files at simplecache:// can only be read; name a URL"),
        ("s4://bucket/run", "no kind of URL begins with s4://; name a URL such as"),
        ("S3://bucket/run", "no kind of URL begins with S3://; name a URL such as"),
        ("git://a/b", r"needs a package that is missing \(Install pygit2 .*\)$"),
        ("gs://bucket/run", r"needs a package that is missing \(.*gcsfs.*\): python -m pip install .*\[remote\]"),
    ],
)
def test_a_url_of_the_wrong_kind_is_refused_without_a_request(
    url: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("gcsfs", "pygit2"):
        monkeypatch.setitem(sys.modules, name, None)  # as if not installed
    with pytest.raises(DataError, match=f"^checkpoint.remote: {url}: {reason}") as caught:
        remote.require_writable_url(url, "checkpoint.remote")
    assert "\n" not in str(caught.value)


def test_files_are_written_read_and_removed(folder: Folder) -> None:
    assert folder.names() == set()
    assert folder.size("a") is None
    with pytest.raises(FileNotFoundError):
        folder.read("a")
    folder.write("a", b"first")
    folder.write("a", b"second")
    folder.write("tasks/b", b"")
    assert folder.names() == {"a", "tasks/b"}
    assert (folder.size("a"), folder.size("tasks/b"), folder.size("tasks/c")) == (6, 0, None)
    assert folder.read("a") == b"second"
    folder.remove({"tasks/b", "never there"})
    assert folder.names() == {"a"}
    folder.remove({"a"})
    assert folder.names() == set()


def test_a_file_is_moved_in_from_scratch(folder: Folder) -> None:
    with scratch_of(folder) as scratch:
        (scratch / "shard").write_bytes(b"content")
        folder.take(scratch, ["shard"])
        assert not (scratch / "shard").exists()
    assert not scratch.exists()
    assert folder.names() == {"shard"}
    assert folder.read("shard") == b"content"


def test_scratch_is_gone_after_an_error_and_after_a_kill(folder: Folder) -> None:
    with pytest.raises(KeyboardInterrupt), scratch_of(folder) as scratch:
        (scratch / "half").write_bytes(b"")
        raise KeyboardInterrupt
    assert not scratch.exists()
    left = [folder.scratch(), folder.scratch()]
    (left[0] / "half").write_bytes(b"")
    folder.write("a", b"")
    folder.remove_scratch()
    assert not any(path.exists() for path in left)
    assert folder.names() == {"a"}


def test_scratch_of_another_url_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    path = open_folder("memory://bucket/one").scratch()
    open_folder("memory://bucket/two").remove_scratch()
    assert path.exists()


def test_free_space_is_known_on_a_disk(tmp_path: Path) -> None:
    free = LocalFolder(tmp_path / "not" / "there" / "yet").free_bytes()
    assert free is not None
    assert free > 0
    assert open_folder("memory://bucket").free_bytes() is None


@pytest.mark.parametrize("reason", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_a_refused_write_is_one_line_and_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reason: int
) -> None:
    folder = LocalFolder(tmp_path)
    folder.write("a", b"old")
    before = states(tmp_path.iterdir())

    def refuse(*arguments: object) -> None:
        raise OSError(reason, os.strerror(reason))

    for name in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, refuse)
            with pytest.raises(DataError, match=f"cannot write {tmp_path}/a: {os.strerror(reason)}"):
                folder.write("a", b"new")
        assert states(tmp_path.iterdir()) == before


def test_impossible_names_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert LocalFolder(tmp_path / "file").size("a") is None
    with pytest.raises(DataError, match="File name too long"):
        LocalFolder(tmp_path / ("x" * 300)).size("a")


def test_an_incomplete_upload_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def put_half(path: str, target: str, **options: Any) -> None:
        fsspec.filesystem("memory").pipe(target, Path(path).read_bytes()[:3])

    folder = RemoteFolder("memory://bucket/out")
    (tmp_path / "shard").write_bytes(b"content")
    monkeypatch.setattr(folder._files.fs, "put_file", put_half)
    with pytest.raises(DataError, match="cannot write memory://bucket/out/shard: 3 of 7 bytes arrived"):
        folder.take(tmp_path, ["shard"])
    assert (tmp_path / "shard").exists()
    fsspec.filesystem("memory").rm("/bucket", recursive=True)


def test_errors_of_a_storage_client_are_one_line_with_the_url(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(*arguments: object, **options: object) -> None:
        raise RuntimeError("Access Denied\nrequest id 5")

    def miss(*arguments: object, **options: object) -> None:
        raise FileNotFoundError("The specified bucket does not exist")

    folder = RemoteFolder("memory://bucket/out")
    (tmp_path / "shard").touch()
    with monkeypatch.context() as patch:
        for name in ("cat_file", "pipe_file", "put_file", "exists", "find", "size"):
            patch.setattr(folder._files, name, refuse)
        for attempt in (
            lambda: folder.read("a"),
            lambda: folder.write("a", b""),
            lambda: folder.take(tmp_path, ["shard"]),
            lambda: folder.names(),
            lambda: folder.size("a"),
            lambda: folder.remove({"a"}),
        ):
            with pytest.raises(DataError) as caught:
                attempt()
            assert str(caught.value) == "cannot use memory://bucket/out: RuntimeError: Access Denied"
    monkeypatch.setattr(folder._files, "pipe_file", miss)
    with pytest.raises(DataError, match="cannot write memory://bucket/out/a: The specified bucket does not exist"):
        folder.write("a", b"")


@pytest.mark.parametrize("request_of", [lambda url: open_folder(url).names(), lambda url: find_files([url], ())])
def test_a_server_that_never_answers_is_announced_and_given_up(
    request_of: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(remote, "_ANNOUNCE_AFTER_S", 0.1)
    monkeypatch.setattr(remote, "_LONGEST_WAIT_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as server:  # accepts connections and is silent
        url = f"http://127.0.0.1:{server.getsockname()[1]}/run"
        with pytest.raises(DataError, match=f"{url}: no answer from the server in"):
            request_of(url)
    assert f"still waiting for an answer from the server of {url}" in caplog.text
