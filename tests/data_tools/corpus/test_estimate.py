"""Check the estimate of a run, and that a run that does not fit on the disk is refused."""

from __future__ import annotations

import gzip
import json
import os
import shutil
from collections import namedtuple
from pathlib import Path

import pytest

from data_tools.corpus.chunks import plan_chunks
from data_tools.corpus.estimate import Estimate, check_free_space, estimate_run
from data_tools.corpus.run import TokenizeRequest, tokenize_corpus
from data_tools.corpus.worker_server import WORKER_BYTES
from data_tools.errors import DataError
from data_tools.options import SourceKind, SourceRequest
from data_tools.shards.contents import Contents
from data_tools.sources import open_source
from data_tools.sources.jsonl import JsonlSource
from data_tools.storage.folders import LocalFolder
from tests.data_tools.conftest import contents, json_lines, result, states

Usage = namedtuple("Usage", "total used free")
TEXT = "The quick brown fox jumps over the lazy dog. " * 20_000
RECORD = json.dumps({"text": TEXT}).encode() + b","


class Watcher:
    """Records the calls of the run."""

    def __init__(self) -> None:
        self.estimates: list[Estimate] = []
        self.progress: list[Contents] = []

    def planned(self, estimate: Estimate) -> None:
        self.estimates.append(estimate)

    def progressed(self, progress: Contents) -> None:
        self.progress.append(progress)


def text_request(tmp_path: Path, **options: object) -> TokenizeRequest:
    (tmp_path / "a.txt").write_text(TEXT)
    settings = {"workers": 1, "document_separator": "\n\n", **options}
    return TokenizeRequest(source="text", inputs=(str(tmp_path / "a.txt"),), out=tmp_path / "out", **settings)  # type: ignore[arg-type]


def test_the_estimate_is_near_what_is_written(tmp_path: Path) -> None:
    watcher = Watcher()
    manifest = tokenize_corpus(text_request(tmp_path, val_fraction=0.0), watcher)
    (estimated,) = watcher.estimates
    assert estimated.text_bytes == len(TEXT)
    assert estimated.tokens == pytest.approx(manifest.tokens_of("train"), rel=0.01)
    assert estimated.shard_bytes == pytest.approx((tmp_path / "out" / "train_00000_000.npy").stat().st_size, rel=0.01)
    assert estimated.free_bytes is not None
    assert (estimated.chunks, estimated.workers) == (1, 1)
    assert str(estimated).startswith("about 900.0 kB of text, 2")
    assert " free); 1 chunk, 1 process, up to " in str(estimated)


@pytest.mark.parametrize(
    ("source", "name", "content", "separator", "is_whole"),
    [
        ("text", "a.txt", TEXT.encode() * 21, None, True),
        ("text", "a.txt", TEXT.encode() * 21, "\n\n", False),
        ("text", "a.txt.gz", gzip.compress(os.urandom(len(TEXT) * 6).hex().encode()), None, True),
        ("jsonl", "a.json", b"[" + RECORD * 21 + b"{}]", None, True),
        ("jsonl", "a.json", RECORD.replace(b"},", b"}\n") * 21, None, False),
    ],
    ids=["text", "divided", "compressed", "array", "lines"],
)
def test_a_file_that_is_held_in_memory_completely_needs_more_memory(
    tmp_path: Path, source: SourceKind, name: str, content: bytes, separator: str | None, is_whole: bool
) -> None:
    (tmp_path / name).write_bytes(content)
    inputs = (str(tmp_path / name),)
    request = TokenizeRequest(
        source=source, inputs=inputs, out=tmp_path / "out", workers=2, document_separator=separator
    )
    opened = open_source(request)
    estimate = estimate_run(request, opened, plan_chunks(opened, request), None)
    text_bytes = len(content) * (4 if name.endswith(".gz") else 1)
    of_the_file = (200 << 20) + 20 * text_bytes if is_whole else WORKER_BYTES
    assert estimate.memory_bytes == of_the_file + (estimate.workers - 1) * WORKER_BYTES


def test_a_whole_file_is_found_among_larger_files(tmp_path: Path) -> None:
    """A process may read it while the other processes read lines."""
    lines = RECORD.replace(b"},", b"}\n")
    sizes = {}
    for name, content in {
        "lines.jsonl": lines * 15,
        "largest.json": b"[" + RECORD * 13 + b"{}]",
        "more.jsonl": lines * 12,
        "second.json": b"[" + RECORD * 11 + b"{}]",
        "third.json": b"[" + RECORD * 10 + b"{}]",
        "small.json": b"[" + RECORD + b"{}]",
    }.items():
        (tmp_path / name).write_bytes(content)
        sizes[name] = len(content)
    source = open_source(SourceRequest(source="jsonl", inputs=(str(tmp_path),)))
    whole = [sizes[name] for name in ("largest.json", "second.json", "third.json")]
    assert source.whole_texts(1, 5_000_000) == whole[:1]
    assert source.whole_texts(2, 5_000_000) == whole[:2]
    assert source.whole_texts(9, 5_000_000) == whole


def test_only_large_files_are_opened_to_find_whole_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for index in range(9):
        (tmp_path / f"{index}.jsonl").write_bytes(b"{}\n" * index)
    source = open_source(SourceRequest(source="jsonl", inputs=(str(tmp_path),)))
    opened = []
    monkeypatch.setattr(JsonlSource, "_is_read_whole", lambda source, path: opened.append(Path(path).name))
    assert source.whole_texts(2, above_bytes=18) == []
    assert opened == ["8.jsonl", "7.jsonl"]


@pytest.mark.parametrize("options", [{"limit_documents": 1}, {"limit_bytes": 5}])
def test_a_limited_source_has_no_known_size(tmp_path: Path, options: dict[str, int]) -> None:
    watcher = Watcher()
    tokenize_corpus(text_request(tmp_path, **options), watcher)
    assert watcher.estimates[0].tokens is None
    assert str(watcher.estimates[0]).startswith("text of unknown size, 4.")


def test_a_run_that_does_not_fit_on_the_disk_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**9, 10**9 - 123_456, 123_456))
    with pytest.raises(DataError) as caught:
        tokenize_corpus(text_request(tmp_path))
    assert str(caught.value) == (
        f"--out {tmp_path / 'out'} needs about 400.0 kB for shards, 123.5 kB are free; "
        "name another --out, or tokenize less (--limit-bytes)"
    )
    assert not (tmp_path / "out").exists()
    tokenize_corpus(text_request(tmp_path, limit_bytes=10))


@pytest.mark.usefixtures("small_chunks")
def test_finished_chunks_need_no_more_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.jsonl").write_bytes(json_lines([f"{n} {TEXT[:500]}" for n in range(60)]))
    request = TokenizeRequest(
        source="jsonl", inputs=(str(tmp_path / "a.jsonl"),), out=tmp_path / "out", shard_tokens=500, workers=1
    )

    class Stop(Watcher):
        def progressed(self, progress: Contents) -> None:
            if progress.documents > 30:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tokenize_corpus(request, Stop())
    finished = states((tmp_path / "out").glob("*.npy"))
    # All shards need nearly half of the text's bytes, the unfinished ones less than a quarter.
    free_bytes = (tmp_path / "a.jsonl").stat().st_size // 3
    monkeypatch.setattr(LocalFolder, "free_bytes", lambda folder: free_bytes)
    tokenize_corpus(request)
    assert states(finished) == finished
    assert result(tmp_path / "out")


def test_unknown_sizes_always_fit() -> None:
    check_free_space(Estimate(None, 4.0, 0, 1, 1, 1, 1), 0, "--out x")
    check_free_space(Estimate(10**12, 4.0, None, 1, 1, 1, 1), 0, "--out x")
    check_free_space(Estimate(400, 4.0, 200, 1, 1, 1, 1), 0, "--out x")
    with pytest.raises(DataError, match=r"--out x needs about 202 B for shards"):
        check_free_space(Estimate(404, 4.0, 200, 1, 1, 1, 1), 0, "--out x")
    check_free_space(Estimate(404, 4.0, 200, 1, 1, 1, 1), 2, "--out x")


def test_a_corpus_without_text_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(json_lines(["", ""]))
    before = contents(tmp_path)
    request = TokenizeRequest(source="jsonl", inputs=(str(tmp_path / "a.jsonl"),), out=tmp_path / "a" / "b", workers=1)
    with pytest.raises(DataError, match="--source jsonl has no document with text in it; there is nothing to tok"):
        tokenize_corpus(request)
    assert contents(tmp_path) == before
    assert not (tmp_path / "a").exists()
