"""Check that an output folder is started, continued after any crash, completed, or refused without a change."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from data_tools.corpus import estimate as estimate_module
from data_tools.corpus import output as output_module
from data_tools.corpus import worker as worker_module
from data_tools.corpus.estimate import Estimate
from data_tools.corpus.run import TokenizeRequest, find_complete, tokenize_corpus, tokenize_share
from data_tools.errors import DataError
from data_tools.shards.contents import Contents
from data_tools.storage.folders import LocalFolder
from tests.data_tools.conftest import contents, documents_of, json_lines, result, states, varied_documents

DOCUMENTS = varied_documents(60)
pytestmark = pytest.mark.usefixtures("small_chunks")


def request_for(tmp_path: Path, name: str = "out", **options: Any) -> TokenizeRequest:
    """Return a request for a corpus of several chunks."""
    path = tmp_path / "all.jsonl"
    if not path.exists():
        path.write_bytes(json_lines(DOCUMENTS))
    settings = {"source": "jsonl", "inputs": (str(path),), "val_fraction": 0.2, "shard_tokens": 2000, "workers": 1}
    return TokenizeRequest(out=tmp_path / name, **{**settings, **options})


class Interruption(Exception):
    """Ends a run early."""


class StopAfter:
    """Interrupts a run when a number of chunks is finished, and records the progress."""

    def __init__(self, folder: Path, chunks: int) -> None:
        self.seen: list[Contents] = []
        self._folder = folder
        self._chunks = chunks

    def planned(self, estimate: Estimate) -> None:
        pass

    def progressed(self, progress: Contents) -> None:
        self.seen.append(progress)
        if len(list(self._folder.glob("tasks/*.json"))) >= self._chunks:
            raise Interruption


def interrupt(request: TokenizeRequest, after_chunks: int = 3) -> None:
    """Run until a number of chunks is finished."""
    with pytest.raises(Interruption):
        tokenize_corpus(request, StopAfter(Path(request.out), after_chunks))


@pytest.fixture
def whole(tmp_path: Path) -> dict[str, bytes | str]:
    """Return the result of a run without interruption."""
    tokenize_corpus(request_for(tmp_path, "whole"))
    return result(tmp_path / "whole")


# Continuing


@pytest.mark.parametrize("after_chunks", [1, 5])
@pytest.mark.parametrize("workers", [1, 2])
def test_an_interrupted_run_continues_to_the_same_bytes(
    tmp_path: Path, whole: dict[str, bytes | str], after_chunks: int, workers: int
) -> None:
    interrupt(request_for(tmp_path), after_chunks)
    assert not list((tmp_path / "out").rglob("*.partial"))
    assert not list((tmp_path / "out").glob(".*"))
    finished = states((tmp_path / "out").glob("*.npy"))
    watcher = StopAfter(tmp_path / "out", 1000)
    tokenize_corpus(request_for(tmp_path, workers=workers), watcher)
    assert watcher.seen[0].documents > 0
    assert watcher.seen[-1].documents == len(DOCUMENTS)
    assert states(finished) == finished
    assert result(tmp_path / "out") == whole


def test_interruptions_add_up(tmp_path: Path, whole: dict[str, bytes | str]) -> None:
    for after_chunks in (1, 3, 5):
        interrupt(request_for(tmp_path), after_chunks)
    tokenize_corpus(request_for(tmp_path))
    assert result(tmp_path / "out") == whole


def test_the_encoder_and_the_workers_may_change_in_between(tmp_path: Path, whole: dict[str, bytes | str]) -> None:
    interrupt(request_for(tmp_path, encoder="tiktoken"))
    tokenize_corpus(request_for(tmp_path, encoder="gigatoken", workers=2))
    assert result(tmp_path / "out") == whole


def a_shard(folder: Path) -> Path:
    return sorted(folder.glob("train_*.npy"))[1]


def lose_a_shard(folder: Path) -> None:
    a_shard(folder).unlink()


def cut_a_shard(folder: Path) -> None:
    os.truncate(a_shard(folder), 200)


def lose_a_record(folder: Path) -> None:
    sorted(folder.glob("tasks/*.json"))[0].unlink()


def leave_what_a_killed_worker_leaves(folder: Path) -> None:
    (folder / ".scratch-0").mkdir()
    (folder / ".scratch-0" / "train_00004_000.npy.partial").write_bytes(b"half")
    (folder / ".scratch-1").mkdir()
    (folder / "train_00099_000.npy").write_bytes(b"of a chunk whose record was not written")
    (folder / "val_00099_000.npy").write_bytes(b"likewise")
    (folder / "writing.lock").write_bytes(b"not shared")


@pytest.mark.parametrize("crash", [lose_a_shard, cut_a_shard, lose_a_record, leave_what_a_killed_worker_leaves])
def test_a_run_recovers_from_whatever_a_crash_left(
    tmp_path: Path, whole: dict[str, bytes | str], crash: Callable[[Path], None]
) -> None:
    interrupt(request_for(tmp_path), 4)
    crash(tmp_path / "out")
    tokenize_corpus(request_for(tmp_path))
    assert result(tmp_path / "out") == whole


@pytest.mark.parametrize("name", ["plan.json", "tasks/00000.json"])
def test_a_damaged_record_is_named(tmp_path: Path, name: str) -> None:
    interrupt(request_for(tmp_path), 4)
    for content in (b"", b"{", b"[]", b'{"shards": 5}'):
        (tmp_path / "out" / name).write_bytes(content)
        before = contents(tmp_path / "out")
        with pytest.raises(DataError, match=f"{tmp_path}/out/{name} is damaged; delete"):
            tokenize_corpus(request_for(tmp_path))
        assert contents(tmp_path / "out") == before


@pytest.mark.parametrize("deduplicate", ["off", "exact"])
def test_a_run_killed_at_any_change_of_the_folder_is_completed_by_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, deduplicate: str
) -> None:
    """Kill the process before its n-th call of a function that changes the disk, for every fourth n."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    (tmp_path / "all.jsonl").write_bytes(json_lines([text[:900] for text in DOCUMENTS[:8]]))
    request = request_for(tmp_path, deduplicate=deduplicate)
    expected: dict[str, bytes | str] = {}
    left = 0

    class KilledError(BaseException):
        pass

    def kill_when_it_is_time() -> None:
        nonlocal left
        left -= 1
        if left <= 0:
            raise KilledError

    def killing(function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*arguments: Any, **options: Any) -> Any:
            kill_when_it_is_time()
            return function(*arguments, **options)

        return wrapper

    for changes in range(1, 400, 4):
        left = changes
        with monkeypatch.context() as patch:
            for name in ("open", "replace", "rename", "unlink", "mkdir", "rmdir", "remove"):
                patch.setattr(os, name, killing(getattr(os, name)))
            try:
                tokenize_corpus(request)
            except KilledError:
                finished = False
            else:
                finished = True
        tokenize_corpus(request)
        found = result(tmp_path / "out")
        expected = expected or found
        assert found == expected, changes
        for path in (tmp_path / "out").iterdir():
            path.unlink()
        (tmp_path / "out").rmdir()
        if finished:
            break
    assert changes > 30


# Completing


def test_a_folder_is_complete_when_its_manifest_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(output_module, "_remove_work_files", lambda folder: interrupted())
        patch.setattr(output_module.OutputFolder, "abandon", lambda output: None)
        with pytest.raises(Interruption):
            tokenize_corpus(request_for(tmp_path))
    assert (tmp_path / "out" / "plan.json").exists()
    (tmp_path / "out" / ".scratch-0").mkdir()
    (tmp_path / "out" / "writing.lock").touch()
    manifest = find_complete(request_for(tmp_path))
    assert manifest is not None
    assert documents_of(tmp_path / "out") == len(DOCUMENTS)
    assert result(tmp_path / "out")


def interrupted() -> None:
    raise Interruption


def test_a_complete_folder_that_lost_a_shard_says_so(tmp_path: Path) -> None:
    tokenize_corpus(request_for(tmp_path))
    lost = a_shard(tmp_path / "out")
    lost.unlink()
    before = contents(tmp_path / "out")
    for attempt in (find_complete, tokenize_corpus):
        with pytest.raises(DataError, match=rf"{lost.name} is missing.*tokenize again"):
            attempt(request_for(tmp_path))
    assert contents(tmp_path / "out") == before


def test_a_complete_folder_can_be_on_a_read_only_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = tokenize_corpus(request_for(tmp_path))

    def refuse(*arguments: object, **options: object) -> None:
        raise OSError(30, "Read-only file system")

    for name in ("replace", "unlink", "mkdir", "rmdir", "fsync"):
        monkeypatch.setattr(os, name, refuse)
    assert find_complete(request_for(tmp_path)) == tokenize_corpus(request_for(tmp_path)) == manifest
    assert tokenize_share(request_for(tmp_path), 0, 2) == manifest


# Folders of other requests

CHANGES: list[tuple[dict[str, Any], str]] = [
    ({"seed": 5}, "settings.seed was 0, now it is 5"),
    ({"val_fraction": 0.5}, "settings.val_fraction was 0.2, now it is 0.5"),
    ({"format": "arrow"}, 'settings.format was "npy", now it is "arrow"'),
    ({"shard_tokens": 9}, "settings.shard_tokens was 2000, now it is 9"),
    ({"deduplicate": "exact"}, 'settings.deduplicate was "off", now it is "exact"'),
    ({"limit_documents": 9}, "source.options.limit_documents was null, now it is 9"),
    ({"text_field": "id"}, 'source.options.text_field was "text", now it is "id"'),
    ({"source": "python-stdlib", "inputs": ()}, 'source.kind was "jsonl", now it is "python-stdlib"'),
]


@pytest.mark.parametrize("complete", [True, False])
def test_a_folder_of_another_request_is_refused_untouched(tmp_path: Path, complete: bool) -> None:
    if complete:
        tokenize_corpus(request_for(tmp_path))
    else:
        interrupt(request_for(tmp_path))
    before = states(path for path in (tmp_path / "out").rglob("*"))
    for change, message in CHANGES:
        for run in (tokenize_corpus, lambda request: tokenize_share(request, 0, 2)):
            with pytest.raises(DataError) as caught:
                run(request_for(tmp_path, **change))
            assert message in str(caught.value)
            assert "name another --out" in str(caught.value)
            assert "\n" not in str(caught.value)
    assert states(path for path in (tmp_path / "out").rglob("*")) == before


@pytest.mark.parametrize(
    "names",
    [
        ["thesis.txt"],
        ["train_00000_000.npy"],
        ["tasks/00000.json"],
        ["a/b/c"],
        [".hidden"],
        ["thesis.txt", "writing.lock"],
    ],
)
def test_foreign_files_are_left_alone(tmp_path: Path, names: list[str]) -> None:
    for name in names:
        path = tmp_path / "out" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("precious")
    before = states((tmp_path / "out").rglob("*"))
    first = names[0].split("/")[0]
    for run in (tokenize_corpus, lambda request: tokenize_share(request, 0, 2)):
        with pytest.raises(DataError, match=rf"--out .*/out is not empty \(it holds {first}\) and was not made by"):
            run(request_for(tmp_path))
    assert states((tmp_path / "out").rglob("*")) == before


@pytest.mark.parametrize(
    ("source", "pattern"),
    [("text", ""), ("jsonl", ""), ("text", "/**/*"), ("text", "/**"), ("text", "/*/*"), ("jsonl", "/**/*.json*")],
)
def test_an_output_folder_in_the_input_is_refused(tmp_path: Path, source: str, pattern: str) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    for name in ("a.jsonl", "b/a.jsonl"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(json_lines(DOCUMENTS))
    request = request_for(tmp_path, "texts/tokens", source=source, inputs=(f"{folder}{pattern}",))
    message = rf"--out .*/tokens is inside --input {re.escape(request.inputs[0])}, so the shards would be read"
    with pytest.raises(DataError, match=message):
        tokenize_corpus(request)
    assert sorted(path.name for path in folder.iterdir()) == ["a.jsonl", "b"]
    (tmp_path / "link").symlink_to(folder)
    for given, out in ((folder, tmp_path / "link" / "tokens"), (tmp_path / "link", request.out)):
        with pytest.raises(DataError, match="is inside --input"):
            find_complete(replace(request, inputs=(f"{given}{pattern}",), out=out))


def test_an_output_folder_that_the_input_leaves_out_is_accepted(tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "a.jsonl").write_bytes(json_lines(DOCUMENTS))
    request = request_for(tmp_path, "texts/tokens", inputs=(f"{folder}/**/*.jsonl",))
    assert tokenize_corpus(request).shards
    assert find_complete(request)


def test_a_file_in_the_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("precious")
    with pytest.raises(DataError, match="is a file; name a folder"):
        tokenize_corpus(request_for(tmp_path))
    with pytest.raises(DataError, match="cannot write .*: Not a directory"):
        tokenize_corpus(request_for(tmp_path, "out/inside"))
    with pytest.raises(DataError, match="File name too long"):
        tokenize_corpus(request_for(tmp_path, "x" * 300))
    assert (tmp_path / "out").read_text() == "precious"


# Faults


@pytest.mark.parametrize("workers", [1, 2])
def test_a_bad_document_before_the_first_finished_chunk_leaves_nothing(tmp_path: Path, workers: int) -> None:
    (tmp_path / "bad.jsonl").write_bytes(b"{\n" + json_lines(DOCUMENTS))
    request = request_for(tmp_path, "a/b/out", inputs=(str(tmp_path / "bad.jsonl"),), workers=workers)
    with pytest.raises(DataError, match=r"bad\.jsonl:1: not valid JSON"):
        tokenize_corpus(request)
    assert not (tmp_path / "a").exists()
    with pytest.raises(DataError, match=r"bad\.jsonl:1: not valid JSON"):
        tokenize_share(request, 0, 1000)
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("workers", [1, 2])
def test_a_bad_document_later_leaves_finished_chunks_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    monkeypatch.setattr(estimate_module, "_SAMPLE_BYTES", 1)  # the estimate reads only the first document
    (tmp_path / "bad.jsonl").write_bytes(json_lines(DOCUMENTS) + b"{\n")
    request = request_for(tmp_path, inputs=(str(tmp_path / "bad.jsonl"),), workers=workers)
    with pytest.raises(DataError, match=rf"bad\.jsonl:{len(DOCUMENTS) + 1}: not valid JSON"):
        tokenize_corpus(request)
    records = [json.loads(path.read_bytes()) for path in (tmp_path / "out" / "tasks").iterdir()]
    assert records
    shards = {shard["file"] for record in records for shard in record["shards"]}
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"plan.json", "tasks", *shards}


def test_a_folder_that_was_there_stays(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "bad.jsonl").write_bytes(b"{\n")
    with pytest.raises(DataError):
        tokenize_corpus(request_for(tmp_path, inputs=(str(tmp_path / "bad.jsonl"),)))
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("failing", ["plan.json", "tasks/00000.json", "manifest.json"])
def test_a_disk_that_is_full_for_a_moment_costs_no_finished_chunk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: dict[str, bytes | str], failing: str
) -> None:
    write, take = LocalFolder.write, LocalFolder.take

    def refuse(*names: str) -> None:
        if failing in names:
            raise DataError(f"cannot write {failing}: No space left on device")

    def write_or_refuse(folder: LocalFolder, name: str, content: bytes) -> None:
        refuse(name)
        write(folder, name, content)

    def take_or_refuse(folder: LocalFolder, scratch: Path, names: Sequence[str]) -> None:
        refuse(*names)
        take(folder, scratch, names)

    with monkeypatch.context() as patch:
        patch.setattr(LocalFolder, "write", write_or_refuse)
        patch.setattr(LocalFolder, "take", take_or_refuse)
        with pytest.raises(DataError, match="No space left"):
            tokenize_corpus(request_for(tmp_path))
    assert (tmp_path / "out").exists() == (failing == "manifest.json")
    finished = states((tmp_path / "out").glob("*.npy"))
    tokenize_corpus(request_for(tmp_path))
    assert states(finished) == finished
    assert result(tmp_path / "out") == whole


def test_a_chunk_that_is_written_but_not_yet_reported_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: dict[str, bytes | str]
) -> None:
    """Interrupt just after a chunk was written."""
    encode_chunk = worker_module.encode_chunk

    def interrupt_after(*arguments: Any) -> Any:
        encode_chunk(*arguments).finish()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("data_tools.corpus.run.encode_chunk", interrupt_after)
        with pytest.raises(KeyboardInterrupt):
            tokenize_corpus(request_for(tmp_path))
    finished = states((tmp_path / "out").glob("*.npy"))
    assert finished
    tokenize_corpus(request_for(tmp_path))
    assert states(finished) == finished
    assert result(tmp_path / "out") == whole


def test_the_names_of_the_shards_are_durable_before_the_manifest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    sync, write = LocalFolder.sync, LocalFolder.write
    monkeypatch.setattr(LocalFolder, "sync", lambda folder: (events.append("sync"), sync(folder)))
    monkeypatch.setattr(
        LocalFolder, "write", lambda folder, name, content: (events.append(name), write(folder, name, content))
    )
    tokenize_corpus(request_for(tmp_path))
    assert events[events.index("manifest.json") - 1] == "sync"
