"""Stage 1 as a whole: tokens are tiktoken's, bytes are reproducible, and faults leave nothing half-written."""

from __future__ import annotations

import gzip
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiktoken

from data_tools import corpus as corpus_module
from data_tools import output as output_module
from data_tools.corpus import Progress, TokenizeRequest, find_complete, tokenize_corpus
from data_tools.errors import DataError
from data_tools.shards import load_manifest, verify
from data_tools.sources import SourceRequest, open_source
from tests.data_tools.conftest import (
    command_line,
    contents,
    documents_of,
    environment,
    sequential_tokens,
    tokens_of,
    varied_documents,
)

DOCUMENTS = [*varied_documents(60), "a\ud800b lone surrogate", "<|endoftext|>"]
WELL_FORMED = varied_documents(60)
SHARD_TOKENS = 40_000


def write_text(folder: Path) -> dict[str, Any]:
    for index, document in enumerate(WELL_FORMED):
        (folder / f"{index:03d}.txt").write_bytes(document.encode())
    return {"source": "text", "inputs": (str(folder),)}


def write_separated_text(folder: Path) -> dict[str, Any]:
    (folder / "all.txt").write_bytes("\n====\n".join(WELL_FORMED).encode())
    return {"source": "text", "inputs": (str(folder),), "document_separator": "\n====\n"}


def json_lines(documents: list[str]) -> bytes:
    return b"".join(json.dumps({"text": document}).encode() + b"\n" for document in documents)


def write_jsonl(folder: Path) -> dict[str, Any]:
    (folder / "all.jsonl").write_bytes(json_lines(DOCUMENTS))
    return {"source": "jsonl", "inputs": (str(folder),)}


def write_jsonl_gz(folder: Path) -> dict[str, Any]:
    (folder / "all.jsonl.gz").write_bytes(gzip.compress(json_lines(DOCUMENTS)))
    return {"source": "jsonl", "inputs": (str(folder),)}


def write_jsonl_zst(folder: Path) -> dict[str, Any]:
    (folder / "all.jsonl.zst").write_bytes(pa.compress(json_lines(DOCUMENTS), codec="zstd", asbytes=True))
    return {"source": "jsonl", "inputs": (str(folder),)}


def write_parquet(folder: Path) -> dict[str, Any]:
    pq.write_table(pa.table({"text": WELL_FORMED}), folder / "all.parquet", row_group_size=7)
    return {"source": "parquet", "inputs": (str(folder),)}


def write_dataset(folder: Path) -> dict[str, Any]:
    datasets.Dataset.from_dict({"text": WELL_FORMED}).save_to_disk(folder)
    return {"source": "hf", "inputs": (str(folder),)}


def use_standard_library(folder: Path) -> dict[str, Any]:
    return {"source": "python-stdlib", "limit_documents": 40}


SOURCES = {
    "text": (write_text, WELL_FORMED),
    "separated text": (write_separated_text, WELL_FORMED),
    "jsonl": (write_jsonl, DOCUMENTS),
    "jsonl.gz": (write_jsonl_gz, DOCUMENTS),
    "jsonl.zst": (write_jsonl_zst, DOCUMENTS),
    "parquet": (write_parquet, WELL_FORMED),
    "hf": (write_dataset, WELL_FORMED),
    "python-stdlib": (use_standard_library, None),
}


@pytest.fixture
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus_module, "_BATCH_CHARACTERS", 5000)


@pytest.mark.usefixtures("small_batches")
@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("kind", SOURCES)
def test_tokens_are_those_of_a_sequential_encode_ordinary(
    tmp_path: Path, reference: tiktoken.Encoding, kind: str, workers: int
) -> None:
    write, documents = SOURCES[kind]
    (tmp_path / "corpus").mkdir()
    options = write(tmp_path / "corpus")
    if documents is None:
        source = open_source(SourceRequest(source=options["source"])).documents()
        documents = list(itertools.islice(filter(None, source), options["limit_documents"]))
    manifest = tokenize_corpus(
        TokenizeRequest(**options, out=tmp_path / "out", val_fraction=0.0, shard_tokens=3000, workers=workers)
    )
    np.testing.assert_array_equal(tokens_of(tmp_path / "out"), sequential_tokens(reference, documents))
    assert len(manifest.shards) > 1
    assert documents_of(tmp_path / "out") == len(documents)
    assert sum(shard.utf8_bytes for shard in manifest.shards) == sum(
        len(document.encode(errors="replace").replace(b"?", b"\xef\xbf\xbd"))
        if "\ud800" in document
        else len(document.encode())
        for document in documents
    )
    assert verify(tmp_path / "out") == manifest == load_manifest(tmp_path / "out")


def request_for(tmp_path: Path, name: str = "out", **options: Any) -> TokenizeRequest:
    """A request for the JSON Lines corpus, which is written if it is not there."""
    folder = tmp_path / "corpus"
    folder.mkdir(exist_ok=True)
    source = write_jsonl(folder)
    settings = {"val_fraction": 0.2, "shard_tokens": 2000, "workers": 1, **source, **options}
    return TokenizeRequest(out=tmp_path / name, **settings)


@pytest.mark.usefixtures("small_batches")
def test_the_bytes_do_not_depend_on_workers_or_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenize_corpus(request_for(tmp_path, "one"))
    tokenize_corpus(request_for(tmp_path, "two", workers=2))
    monkeypatch.setattr(corpus_module, "_BATCH_CHARACTERS", 1)
    tokenize_corpus(request_for(tmp_path, "three"))
    assert contents(tmp_path / "one") == contents(tmp_path / "two") == contents(tmp_path / "three")


def test_npy_and_arrow_hold_the_same(tmp_path: Path) -> None:
    npy = tokenize_corpus(request_for(tmp_path, "npy"))
    arrow = tokenize_corpus(request_for(tmp_path, "arrow", format="arrow"))
    for split in ("train", "val"):
        np.testing.assert_array_equal(tokens_of(tmp_path / "npy", split), tokens_of(tmp_path / "arrow", split))
        files = [str(tmp_path / "arrow" / shard.file) for shard in arrow.shards_of(split)]
        opened = datasets.concatenate_datasets([datasets.Dataset.from_file(file) for file in files])
        np.testing.assert_array_equal(opened.with_format("numpy")["tokens"][:], tokens_of(tmp_path / "npy", split))
    assert [shard.tokens for shard in npy.shards] == [shard.tokens for shard in arrow.shards]


def test_every_document_is_whole_in_one_split(tmp_path: Path, reference: tiktoken.Encoding) -> None:
    manifest = tokenize_corpus(request_for(tmp_path))
    train, val = (
        {tuple(part) for part in split_documents(tokens_of(tmp_path / "out", split))} for split in ("train", "val")
    )
    everything = {tuple(sequential_tokens(reference, [document])) for document in DOCUMENTS}
    assert train | val == everything
    assert not train & val
    assert {shard.split: shard.file for shard in manifest.shards}.keys() == {"train", "val"}
    other_seed = tokenize_corpus(request_for(tmp_path, "other", seed=1))
    assert other_seed.shards_of("val") != manifest.shards_of("val")


def split_documents(tokens: np.ndarray) -> list[np.ndarray]:
    return np.split(tokens, np.flatnonzero(tokens == 50256)[1:])


def test_a_shard_ends_before_the_document_that_would_not_fit(tmp_path: Path) -> None:
    # Each "a " * n is n tokens and a space, END_OF_TEXT comes before it: 4, 4, 4, 21, 4, 4 tokens.
    texts = ["a a a", "b b b", "c c c", " x" * 20, "d d d", "e e e"]
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "all.jsonl").write_bytes(json_lines(texts))
    request = TokenizeRequest(
        source="jsonl",
        inputs=(str(tmp_path / "corpus"),),
        out=tmp_path / "out",
        val_fraction=0,
        shard_tokens=8,
        workers=1,
    )
    assert [shard.tokens for shard in tokenize_corpus(request).shards] == [8, 4, 21, 8]


def test_empty_documents_are_skipped_and_limits_hold(tmp_path: Path) -> None:
    texts = ["", "aa", "", "éé", "bb", "cc"]
    (tmp_path / "all.jsonl").write_bytes(json_lines(texts))

    def documents(name: str, **limits: int) -> int:
        options = {"source": "jsonl", "inputs": (str(tmp_path / "all.jsonl"),), "workers": 1}
        tokenize_corpus(TokenizeRequest(**options, out=tmp_path / name, **limits))
        return documents_of(tmp_path / name)

    assert documents("all") == 4
    assert documents("two", limit_documents=2) == 2
    assert documents("bytes 6", limit_bytes=6) == 2
    assert documents("bytes 7", limit_bytes=7) == 3
    assert documents("both", limit_bytes=7, limit_documents=1) == 1


def test_progress_grows_to_the_totals_of_the_manifest(tmp_path: Path) -> None:
    seen: list[Progress] = []
    manifest = tokenize_corpus(request_for(tmp_path), seen.append)
    assert seen[0] == Progress(0, 0, 0)
    assert seen == sorted(seen, key=lambda progress: progress.documents)
    assert seen[-1] == Progress(
        len(DOCUMENTS),
        sum(shard.tokens for shard in manifest.shards),
        sum(shard.utf8_bytes for shard in manifest.shards),
    )


# Complete and foreign folders


def test_a_complete_folder_is_returned_untouched(tmp_path: Path) -> None:
    request = request_for(tmp_path)
    assert find_complete(request) is None
    manifest = tokenize_corpus(request)
    before = {path: path.stat().st_mtime_ns for path in request.out.iterdir()}

    def refuse(progress: Progress) -> None:
        pytest.fail("there was nothing to do")

    assert find_complete(request) == manifest
    assert tokenize_corpus(request_for(tmp_path, workers=2), refuse) == manifest
    assert {path: path.stat().st_mtime_ns for path in request.out.iterdir()} == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 5}, "settings.seed was 0, now it is 5"),
        ({"val_fraction": 0.5}, "settings.val_fraction was 0.2, now it is 0.5"),
        ({"format": "arrow"}, "settings.format was 'npy', now it is 'arrow'"),
        ({"shard_tokens": 9}, "settings.shard_tokens was 2000, now it is 9"),
        ({"limit_documents": 9}, "source.options.limit_documents was None, now it is 9"),
        ({"source": "python-stdlib", "inputs": ()}, "source.kind was 'jsonl', now it is 'python-stdlib'"),
    ],
)
@pytest.mark.parametrize("complete", [True, False])
def test_a_folder_of_another_request_is_refused_untouched(
    tmp_path: Path, change: dict[str, Any], message: str, complete: bool
) -> None:
    if complete:
        tokenize_corpus(request_for(tmp_path))
    else:
        interrupt(request_for(tmp_path))
    before = contents(tmp_path / "out")
    with pytest.raises(DataError) as caught:
        tokenize_corpus(request_for(tmp_path, **change))
    assert message in str(caught.value)
    assert "name another --out" in str(caught.value)
    assert contents(tmp_path / "out") == before


def test_a_changed_input_is_another_request(tmp_path: Path) -> None:
    tokenize_corpus(request_for(tmp_path))
    (tmp_path / "corpus" / "more.jsonl").write_bytes(json_lines(["more"]))
    with pytest.raises(DataError, match=r"source\.options\.files was 1, now it is 2"):
        tokenize_corpus(request_for(tmp_path))


def test_a_complete_folder_that_lost_a_shard_says_so(tmp_path: Path) -> None:
    tokenize_corpus(request_for(tmp_path))
    (tmp_path / "out" / "train_000001.npy").unlink()
    with pytest.raises(DataError, match=r"train_000001\.npy is missing.*delete the folder"):
        tokenize_corpus(request_for(tmp_path))


def test_foreign_files_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("precious")
    (tmp_path / "out" / "train_000000.npy.partial").write_text("precious too")
    before = contents(tmp_path / "out")
    with pytest.raises(DataError, match=r"is not empty \(it holds thesis\.txt\)"):
        tokenize_corpus(request_for(tmp_path))
    assert contents(tmp_path / "out") == before


def test_a_file_in_the_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("precious")
    with pytest.raises(DataError, match="is a file; name a folder"):
        tokenize_corpus(request_for(tmp_path))
    with pytest.raises(DataError, match="cannot write .*: Not a directory"):
        tokenize_corpus(request_for(tmp_path, "out/inside"))


# Interruptions


class Interruption(Exception):
    """Stands for whatever ends a run early."""


def interrupt(request: TokenizeRequest, after_shards: int = 3) -> None:
    """Run until some shards are finished."""

    def stop(progress: Progress) -> None:
        if len(list(request.out.glob("*.npy"))) >= after_shards:
            raise Interruption

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus_module, "_BATCH_CHARACTERS", 1)
        with pytest.raises(Interruption):
            tokenize_corpus(request, stop)


@pytest.mark.parametrize("after_shards", [1, 2, 4])
@pytest.mark.parametrize("workers", [1, 2])
def test_an_interrupted_run_continues_to_the_same_bytes(tmp_path: Path, after_shards: int, workers: int) -> None:
    tokenize_corpus(request_for(tmp_path, "whole"))
    interrupt(request_for(tmp_path), after_shards)
    assert not list((tmp_path / "out").glob("*.partial"))
    finished = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.npy")}
    seen: list[Progress] = []
    tokenize_corpus(request_for(tmp_path, workers=workers), seen.append)
    assert seen[0].documents > 0
    assert seen[-1].documents == len(DOCUMENTS)
    assert {path: path.stat().st_mtime_ns for path in finished} == finished
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_second_interruption_continues_too(tmp_path: Path) -> None:
    tokenize_corpus(request_for(tmp_path, "whole"))
    for after_shards in (1, 3, 5):
        interrupt(request_for(tmp_path), after_shards)
    tokenize_corpus(request_for(tmp_path))
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def lose_a_shard(folder: Path) -> None:
    (folder / "train_000001.npy").unlink()


def cut_a_shard(folder: Path) -> None:
    os.truncate(folder / "train_000001.npy", 200)


def leave_a_partial_file(folder: Path) -> None:
    (folder / "train_000004.npy.partial").write_bytes(b"half")
    (folder / "train_999999.npy.partial").write_bytes(b"of a shard that the repeated run does not make")
    (folder / "val_999999.npy").write_bytes(b"named, but not recorded before the crash")
    (folder / "manifest.json.partial").write_bytes(b"{")


def tear_the_journal(folder: Path) -> None:
    path = folder / "journal.jsonl"
    os.truncate(path, path.stat().st_size - 20)


def empty_the_journal(folder: Path) -> None:
    os.truncate(folder / "journal.jsonl", 0)


@pytest.mark.parametrize(
    "crash", [lose_a_shard, cut_a_shard, leave_a_partial_file, tear_the_journal, empty_the_journal]
)
def test_whatever_a_crash_left_is_made_whole(tmp_path: Path, crash: Callable[[Path], None]) -> None:
    tokenize_corpus(request_for(tmp_path, "whole"))
    interrupt(request_for(tmp_path), 4)
    crash(tmp_path / "out")
    tokenize_corpus(request_for(tmp_path))
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_killed_between_manifest_and_journal_the_folder_is_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = tokenize_corpus(request_for(tmp_path, "whole"))
    with monkeypatch.context() as patch:
        patch.setattr(output_module.Journal, "remove", raise_interruption)
        with pytest.raises(Interruption):
            tokenize_corpus(request_for(tmp_path))
    assert (tmp_path / "out" / "journal.jsonl").exists()
    assert tokenize_corpus(request_for(tmp_path)) == manifest
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def raise_interruption(journal: object) -> None:
    raise Interruption


def test_a_source_that_lost_documents_meanwhile_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupt(request_for(tmp_path), 4)
    size = (tmp_path / "corpus" / "all.jsonl").stat().st_size
    only = json.dumps({"text": "x" * (size - 13)}).encode() + b"\n"
    assert len(only) == size
    request = request_for(tmp_path)
    (tmp_path / "corpus" / "all.jsonl").write_bytes(only)
    with pytest.raises(DataError, match="the source changed since the interrupted run"):
        tokenize_corpus(request)


@pytest.fixture(scope="module")
def large_corpus(tmp_path_factory: pytest.TempPathFactory) -> LargeCorpus:
    """Several megabytes, so that a run lasts long enough to be killed in the middle."""
    folder = tmp_path_factory.mktemp("large")
    path = folder / "large.jsonl"
    path.write_bytes(json_lines([f"{index} {text}" for index, text in enumerate(varied_documents(500) * 10)]))
    corpus = LargeCorpus(path, {})
    tokenize_corpus(corpus.request(folder / "whole", workers=1))
    corpus.result.update(contents(folder / "whole"))
    return corpus


@dataclass(frozen=True)
class LargeCorpus:
    """A corpus and the files that an uninterrupted run makes of it."""

    path: Path
    result: dict[str, bytes]

    def request(self, out: Path, workers: int) -> TokenizeRequest:
        return TokenizeRequest(
            source="jsonl", inputs=(str(self.path),), out=out, shard_tokens=SHARD_TOKENS, workers=workers
        )

    def start(self, out: Path, workers: int) -> subprocess.Popen[str]:
        """The same request as a process of its own."""
        options = ["--input", self.path, "--shard-tokens", SHARD_TOKENS, "--workers", workers]
        return subprocess.Popen(
            command_line("--source", "jsonl", *options, "--out", out),
            env=environment(),
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGINT])
@pytest.mark.parametrize("workers", [1, 2])
def test_killed_in_the_middle_and_repeated_gives_the_same_bytes(
    tmp_path: Path, large_corpus: LargeCorpus, sent: signal.Signals, workers: int
) -> None:
    out = tmp_path / "out"
    with large_corpus.start(out, workers) as process:
        wait_until(lambda: (out / "train_000001.npy").exists(), process)
        # Ctrl-C on a terminal reaches the workers as well, a kill does not.
        send = os.killpg if sent == signal.SIGINT else os.kill
        send(process.pid, sent)
        _, errors = process.communicate(timeout=30)
    assert process.returncode == (130 if sent == signal.SIGINT else -signal.SIGKILL)
    # After SIGKILL, Python's own resource tracker may speak; Ctrl-C is one line.
    assert sent == signal.SIGKILL or errors == "error: interrupted\n"
    assert (out / "journal.jsonl").exists()
    assert not (out / "manifest.json").exists()
    finished = {path: path.stat().st_mtime_ns for path in out.glob("*.npy")}
    tokenize_corpus(large_corpus.request(out, workers))
    kept = [path for path in finished if path.stat().st_mtime_ns == finished[path]]
    assert len(kept) >= len(finished) - 1, "a finished shard was made again"
    assert contents(out) == large_corpus.result


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline_s = time.monotonic() + 30
    while not condition():
        assert process.poll() is None, "it ended too early"
        assert time.monotonic() < deadline_s, "it took too long"
        time.sleep(0.002)


# Faults


def test_an_empty_corpus_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_bytes(json_lines(["", ""]))
    request = TokenizeRequest(source="jsonl", inputs=(str(tmp_path / "empty.jsonl"),), out=tmp_path / "a" / "out")
    with pytest.raises(DataError, match="no document with text in it"):
        tokenize_corpus(request)
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("workers", [1, 2])
def test_a_bad_document_before_the_first_shard_leaves_nothing(tmp_path: Path, workers: int) -> None:
    (tmp_path / "bad.jsonl").write_bytes(json_lines(DOCUMENTS) + b"{\n")
    request = TokenizeRequest(
        source="jsonl", inputs=(str(tmp_path / "bad.jsonl"),), out=tmp_path / "out", workers=workers
    )
    with pytest.raises(DataError, match=f"bad.jsonl:{len(DOCUMENTS) + 1}: not valid JSON"):
        tokenize_corpus(request)
    assert not (tmp_path / "out").exists()


def test_a_disk_full_before_the_first_record_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(journal: object, shard: object) -> None:
        assert (tmp_path / "out" / "val_000000.npy").exists() or (tmp_path / "out" / "train_000000.npy").exists()
        raise DataError("cannot write journal.jsonl: No space left on device")

    monkeypatch.setattr(output_module.Journal, "append", refuse)
    with pytest.raises(DataError, match="No space left"):
        tokenize_corpus(request_for(tmp_path))
    assert not (tmp_path / "out").exists()


def test_a_folder_that_was_there_stays(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "bad.jsonl").write_bytes(json_lines(["a"]) + b"{\n")
    with pytest.raises(DataError):
        tokenize_corpus(TokenizeRequest(source="jsonl", inputs=(str(tmp_path / "bad.jsonl"),), out=tmp_path / "out"))
    assert contents(tmp_path / "out") == {}


DISK_FULL = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, resource.RLIM_INFINITY))
sys.argv = {arguments!r}
import runpy
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize("format", ["npy", "arrow"])
@pytest.mark.parametrize(("limit", "finished"), [(300, False), (60_000, False), (90_000, True)])
def test_a_full_disk_is_one_line_and_nothing_half_written(
    tmp_path: Path, format: str, limit: int, finished: bool
) -> None:
    # Small documents fill shards of 80 kB, the last one has a shard of its own that the disk cannot hold.
    texts = [f"{index} {text}" for index, text in enumerate(varied_documents(300))]
    (tmp_path / "all.jsonl").write_bytes(json_lines([*texts, " word" * 60_000]))
    shared: dict[str, Any] = {
        "source": "jsonl",
        "inputs": (str(tmp_path / "all.jsonl"),),
        "format": format,
        "val_fraction": 0.0,
        "shard_tokens": SHARD_TOKENS,
        "workers": 1,
    }
    options = ["--input", tmp_path / "all.jsonl", "--format", format, "--val-fraction", 0.0]
    options += ["--shard-tokens", SHARD_TOKENS, "--workers", 1, "--out", tmp_path / "out"]
    arguments = command_line("--source", "jsonl", *options)[1:]
    result = subprocess.run(
        [sys.executable, "-c", DISK_FULL.format(limit=limit, arguments=arguments)],
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 2
    assert len(result.stderr.splitlines()) == 1
    assert result.stderr.startswith(f"error: cannot write {tmp_path / 'out'}")
    assert result.stderr.endswith(": File too large\n")
    assert (tmp_path / "out").exists() == finished
    if finished:
        names = contents(tmp_path / "out").keys()
        assert len(names) > 1
        assert names == {"journal.jsonl", *(f"train_{n:06d}.{format}" for n in range(len(names) - 1))}
    for folder in ("out", "whole"):
        tokenize_corpus(TokenizeRequest(**shared, out=tmp_path / folder))
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="finds worker processes in /proc")
def test_a_worker_that_is_killed_is_one_line_and_the_run_continues(tmp_path: Path, large_corpus: LargeCorpus) -> None:
    out = tmp_path / "out"
    with large_corpus.start(out, workers=2) as process:
        wait_until(lambda: (out / "train_000001.npy").exists(), process)
        os.kill(next(workers_of(process.pid)), signal.SIGKILL)
        _, errors = process.communicate(timeout=30)
    assert process.returncode == 2
    assert errors.startswith("error: one of the 2 worker processes died")
    assert len(errors.splitlines()) == 1
    assert not list(out.glob("*.partial"))
    tokenize_corpus(large_corpus.request(out, workers=2))
    assert contents(out) == large_corpus.result


def workers_of(pid: int) -> Iterator[int]:
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes():
            yield int(child)
