"""Check that input and output at URLs give the same shards as on the disk, with one process or several."""

from __future__ import annotations

import functools
import gzip
import http.server
import json
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest

from data_tools.corpus.estimate import Estimate
from data_tools.corpus.run import TokenizeRequest, find_complete, tokenize_corpus, tokenize_share
from data_tools.errors import DataError
from data_tools.shards.contents import Contents
from data_tools.shards.manifest import parse_manifest
from data_tools.storage.folders import RemoteFolder
from tests.data_tools.conftest import CHUNK_BYTES, Command, json_lines, result, varied_documents

DOCUMENTS = varied_documents(60)
pytestmark = pytest.mark.usefixtures("small_chunks")


@pytest.fixture
def out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Yield the URL of an output folder, and check that no scratch folder remains."""
    (tmp_path / "scratch").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))
    yield "memory://bucket/corpora/out"
    assert list((tmp_path / "scratch").iterdir()) == []
    files = fsspec.filesystem("memory")
    if files.exists("/bucket"):
        files.rm("/bucket", recursive=True)


def request_for(tmp_path: Path, out: Path | str, **options: Any) -> TokenizeRequest:
    if not (tmp_path / "a.jsonl").exists():
        (tmp_path / "a.jsonl").write_bytes(json_lines(DOCUMENTS))
    settings = {"inputs": (str(tmp_path / "a.jsonl"),), "val_fraction": 0.2, "shard_tokens": 2000, "workers": 1}
    return TokenizeRequest(source="jsonl", out=out, **{**settings, **options})


@pytest.fixture
def whole(tmp_path: Path) -> dict[str, bytes | str]:
    """Return the result of the same request on the disk."""
    tokenize_corpus(request_for(tmp_path, tmp_path / "whole"))
    return result(tmp_path / "whole")


def names(out: str) -> set[str]:
    files, root = fsspec.core.url_to_fs(out)
    return {path[len(root) + 1 :] for path in files.find(root)} if files.exists(root) else set()


def remote_result(out: str) -> dict[str, bytes | str]:
    """Return the same as ``result`` for a URL."""
    files, root = fsspec.core.url_to_fs(out)
    found = {name: files.cat_file(f"{root}/{name}") for name in names(out)}
    return {**found, "manifest.json": parse_manifest(found["manifest.json"], "manifest.json").content_sha256()}


class StopAfter:
    """Interrupts a run after a number of documents."""

    def __init__(self, documents: int) -> None:
        self._documents = documents

    def planned(self, estimate: Estimate) -> None:
        assert estimate.free_bytes is None

    def progressed(self, progress: Contents) -> None:
        if progress.documents >= self._documents:
            raise KeyboardInterrupt


def test_the_same_shards_as_on_the_disk(tmp_path: Path, out: str, whole: dict[str, bytes | str]) -> None:
    assert find_complete(request_for(tmp_path, out)) is None
    manifest = tokenize_corpus(request_for(tmp_path, out))
    assert remote_result(out) == whole
    assert find_complete(request_for(tmp_path, out)) == tokenize_corpus(request_for(tmp_path, f"{out}/")) == manifest
    with pytest.raises(DataError, match=r"settings\.seed was 0, now it is 1"):
        tokenize_corpus(request_for(tmp_path, out, seed=1))
    fsspec.filesystem("memory").rm(f"/bucket/corpora/out/{manifest.shards[0].file}")
    with pytest.raises(DataError, match=rf"{out}/{manifest.shards[0].file} is missing"):
        find_complete(request_for(tmp_path, out))


def test_an_interrupted_run_continues(tmp_path: Path, out: str, whole: dict[str, bytes | str]) -> None:
    with pytest.raises(KeyboardInterrupt):
        tokenize_corpus(request_for(tmp_path, out), StopAfter(20))
    files = fsspec.filesystem("memory")
    created = {name: files.created(f"/bucket/corpora/out/{name}") for name in names(out) if name.endswith(".npy")}
    assert created
    assert "plan.json" in names(out)
    before = names(out)
    with pytest.raises(DataError, match=r"settings\.seed was 0, now it is 1"):
        tokenize_corpus(request_for(tmp_path, out, seed=1))
    assert names(out) == before
    tokenize_corpus(request_for(tmp_path, out))
    assert {name: files.created(f"/bucket/corpora/out/{name}") for name in created} == created
    assert remote_result(out) == whole


class RemoveFirstShard(StopAfter):
    """Removes a shard after a number of documents, as a second command with the same URL would do."""

    def progressed(self, progress: Contents) -> None:
        files = fsspec.filesystem("memory")
        shards = [path for path in files.find("/bucket/corpora/out") if path.endswith(".npy")]
        if progress.documents >= self._documents and shards:
            files.rm(shards[0])
            self._documents = len(DOCUMENTS) + 1


def test_a_manifest_never_names_shards_that_another_command_has_removed(
    tmp_path: Path, out: str, whole: dict[str, bytes | str]
) -> None:
    with pytest.raises(DataError, match="another command has written to the same URL; run this command again"):
        tokenize_corpus(request_for(tmp_path, out), RemoveFirstShard(20))
    assert "manifest.json" not in names(out)
    tokenize_corpus(request_for(tmp_path, out))
    assert remote_result(out) == whole


@pytest.mark.parametrize("deduplicate", ["off", "exact"])
def test_shares(tmp_path: Path, out: str, deduplicate: str) -> None:
    tokenize_corpus(request_for(tmp_path, tmp_path / "whole", deduplicate=deduplicate))
    while find_complete(request_for(tmp_path, out, deduplicate=deduplicate)) is None:
        for share in (1, 0):
            tokenize_share(request_for(tmp_path, out, deduplicate=deduplicate), share, 2)
    assert remote_result(out) == result(tmp_path / "whole")


def test_a_failed_run_leaves_nothing_and_touches_nothing(tmp_path: Path, out: str) -> None:
    request = request_for(tmp_path, out)
    (tmp_path / "a.jsonl").write_bytes(b"{\n")
    with pytest.raises(DataError, match="not valid JSON"):
        tokenize_corpus(request)
    assert names(out) == set()
    fsspec.filesystem("memory").pipe("/bucket/corpora/out/thesis.txt", b"precious")
    with pytest.raises(DataError, match=r"is not empty \(it holds thesis\.txt\)"):
        tokenize_corpus(request_for(tmp_path, out))
    assert names(out) == {"thesis.txt"}


def test_shards_at_a_url_of_input_at_a_url(out: str, tmp_path: Path, whole: dict[str, bytes | str]) -> None:
    files = fsspec.filesystem("memory")
    files.pipe("/bucket/in/a.jsonl", json_lines(DOCUMENTS))
    tokenize_corpus(request_for(tmp_path, out, inputs=("memory://bucket/in/*.jsonl",)))
    shards = {name: content for name, content in whole.items() if name != "manifest.json"}
    assert shards.items() <= remote_result(out).items()


# Several processes


def test_several_processes_write_to_a_url(
    tmp_path: Path, run_process: Command, monkeypatch: pytest.MonkeyPatch, whole: dict[str, bytes | str]
) -> None:
    """Use a folder of the disk through fsspec, which needs an option to create folders."""
    monkeypatch.setenv("FSSPEC_FILE_AUTO_MKDIR", "1")
    options = ["--source", "jsonl", "--input", tmp_path / "a.jsonl", "--val-fraction", 0.2, "--shard-tokens", 2000]
    ended = run_process(*options, "--workers", 2, "--out", f"file://{tmp_path}/out", chunk_bytes=CHUNK_BYTES)
    assert ended.returncode == 0, ended.stderr
    (tmp_path / "out" / "tasks").rmdir()  # object stores have no folders, and so no empty ones
    assert result(tmp_path / "out") == whole
    assert f"file://{tmp_path}/out:\n  split " in ended.stdout
    again = run_process(*options, "--workers", 2, "--out", f"file://{tmp_path}/out", chunk_bytes=CHUNK_BYTES)
    assert "is already complete" in again.stdout
    assert not list(Path(tempfile.gettempdir()).glob(f"{RemoteFolder(f'file://{tmp_path}/out')._scratch_prefix}*"))


class RangeHandler(http.server.SimpleHTTPRequestHandler):
    """Serves ranges of bytes, as object stores do."""

    def log_message(self, format: str, *arguments: object) -> None:
        pass

    def send_head(self) -> Any:
        wanted = self.headers.get("Range")
        path = Path(self.translate_path(self.path))
        if wanted is None or not path.is_file():
            return super().send_head()
        content = path.read_bytes()
        first, last = wanted.removeprefix("bytes=").split("-")
        start, stop = int(first), min(int(last or len(content)) + 1, len(content))
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(content)}")
        self.send_header("Content-Length", str(stop - start))
        self.end_headers()
        self.wfile.write(content[start:stop])
        return None


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    """Serve the folder ``served`` on this machine, and yield the address."""
    (tmp_path / "served").mkdir()
    handler = functools.partial(RangeHandler, directory=str(tmp_path / "served"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as serving:
        thread = threading.Thread(target=serving.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{serving.server_port}"
        serving.shutdown()
        thread.join()


def test_several_processes_read_from_a_server(
    tmp_path: Path, run_process: Command, server: str, whole: dict[str, bytes | str]
) -> None:
    (tmp_path / "served" / "a.jsonl").write_bytes(json_lines(DOCUMENTS[:30]))
    (tmp_path / "served" / "b.jsonl.gz").write_bytes(gzip.compress(json_lines(DOCUMENTS[30:])))
    inputs = [f"{server}/a.jsonl", f"{server}/b.jsonl.gz"]
    options = ["--source", "jsonl", "--input", *inputs, "--val-fraction", 0.2, "--shard-tokens", 2000]
    ended = run_process(*options, "--workers", 2, "--out", "remote", chunk_bytes=CHUNK_BYTES)
    assert ended.returncode == 0, ended.stderr
    local = tuple(str(tmp_path / "served" / name) for name in ("a.jsonl", "b.jsonl.gz"))
    tokenize_corpus(request_for(tmp_path, tmp_path / "local", inputs=local))
    remote, on_disk = result(tmp_path / "remote"), result(tmp_path / "local")
    del remote["manifest.json"], on_disk["manifest.json"]  # they say where the documents came from
    assert remote == on_disk
    manifest = json.loads((tmp_path / "remote" / "manifest.json").read_bytes())
    assert manifest["source"]["options"]["inputs"] == inputs
    with pytest.raises(DataError, match=f"{server}/none.jsonl"):
        tokenize_corpus(request_for(tmp_path, tmp_path / "none", inputs=(f"{server}/none.jsonl",)))


@pytest.mark.usefixtures("small_chunks")
def test_a_server_that_sends_only_whole_files_is_named(
    tmp_path: Path, server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RangeHandler, "send_head", http.server.SimpleHTTPRequestHandler.send_head)
    (tmp_path / "served" / "a.jsonl").write_bytes(json_lines(DOCUMENTS))
    url = f"{server}/a.jsonl"
    with pytest.raises(DataError) as caught:
        tokenize_corpus(request_for(tmp_path, tmp_path / "out", inputs=(url,)))
    assert str(caught.value) == f"cannot read {url}: the server sends only whole files; download the file first"
