"""Check that the tokens of stage 1 are tiktoken's, and that its bytes depend on the request alone."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiktoken

from data_tools.corpus import engines
from data_tools.corpus.estimate import Estimate
from data_tools.corpus.run import TokenizeRequest, find_complete, tokenize_corpus
from data_tools.encoding.documents import utf8_of
from data_tools.errors import DataError
from data_tools.shards.contents import Contents
from data_tools.shards.manifest import load_manifest
from data_tools.shards.reader import open_split
from data_tools.shards.verification import verify
from data_tools.sources import SourceRequest, open_source
from tests.data_tools.conftest import (
    documents_of,
    drawn_for,
    json_lines,
    read_documents,
    result,
    sequential_tokens,
    states,
    tokens_of,
    varied_documents,
    zstd,
)

WELL_FORMED = varied_documents(60)
DOCUMENTS = [*WELL_FORMED, "a\ud800b lone surrogate", "", "<|endoftext|>", WELL_FORMED[3]]
SEPARATOR = "\n====\n"


def write_text(folder: Path) -> dict[str, Any]:
    for index, document in enumerate(WELL_FORMED):
        (folder / f"{index:03d}.txt").write_bytes(document.encode())
    return {"source": "text", "inputs": (str(folder),)}


def write_separated_text(folder: Path) -> dict[str, Any]:
    (folder / "a.txt").write_bytes(SEPARATOR.join(WELL_FORMED[:40]).encode())
    (folder / "b.txt.gz").write_bytes(gzip.compress(SEPARATOR.join(WELL_FORMED[40:]).encode()))
    return {"source": "text", "inputs": (str(folder),), "document_separator": SEPARATOR}


def write_jsonl(folder: Path) -> dict[str, Any]:
    (folder / "all.jsonl").write_bytes(json_lines(DOCUMENTS))
    return {"source": "jsonl", "inputs": (str(folder),)}


def write_compressed_jsonl(folder: Path) -> dict[str, Any]:
    (folder / "a.jsonl.gz").write_bytes(gzip.compress(json_lines(DOCUMENTS[:20])))
    (folder / "b.jsonl.zst").write_bytes(zstd(json_lines(DOCUMENTS[20:40])))
    (folder / "c.jsonl.gz").write_bytes(gzip.compress(json_lines(DOCUMENTS[40:])))
    return {"source": "jsonl", "inputs": (str(folder),)}


def write_parquet(folder: Path) -> dict[str, Any]:
    pq.write_table(pa.table({"text": WELL_FORMED}), folder / "all.parquet", row_group_size=7)
    return {"source": "parquet", "inputs": (str(folder),)}


def write_dataset(folder: Path) -> dict[str, Any]:
    datasets.Dataset.from_dict({"text": WELL_FORMED}).save_to_disk(folder)
    return {"source": "hf", "inputs": (str(folder),)}


def write_data_files(folder: Path) -> dict[str, Any]:
    for index in range(3):
        (folder / f"train-{index}.jsonl").write_bytes(json_lines(WELL_FORMED[index * 20 : index * 20 + 20]))
    return {"source": "hf", "inputs": (str(folder),)}


def use_standard_library(folder: Path) -> dict[str, Any]:
    return {"source": "python-stdlib", "limit_documents": 15}


SOURCES: dict[str, tuple[Callable[[Path], dict[str, Any]], list[str] | None]] = {
    "text": (write_text, WELL_FORMED),
    "separated text": (write_separated_text, WELL_FORMED),
    "jsonl": (write_jsonl, DOCUMENTS),
    "compressed jsonl": (write_compressed_jsonl, DOCUMENTS),
    "parquet": (write_parquet, WELL_FORMED),
    "saved dataset": (write_dataset, WELL_FORMED),
    "streamed dataset": (write_data_files, WELL_FORMED),
    "python-stdlib": (use_standard_library, None),
}


#: Each worker imports the library for datasets, which takes seconds, so one combination with workers is enough.
RUNS = [
    (kind, workers, format)
    for kind in SOURCES
    for workers in (1, 2)
    for format in ("npy", "arrow")
    if "dataset" not in kind or (workers, format) != (2, "npy")
]


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize(("kind", "workers", "format"), RUNS)
def test_tokens_are_those_of_a_sequential_encode_ordinary_split_by_split(
    tmp_path: Path, reference: tiktoken.Encoding, kind: str, workers: int, format: str
) -> None:
    write, documents = SOURCES[kind]
    (tmp_path / "corpus").mkdir()
    options = write(tmp_path / "corpus")
    if documents is None:
        source = open_source(SourceRequest(source=options["source"]))
        documents = [str(document) for document in read_documents(source) if document][: options["limit_documents"]]
    documents = [document for document in documents if document]
    out = tmp_path / "out"
    manifest = tokenize_corpus(
        TokenizeRequest(**options, out=out, val_fraction=0.2, shard_tokens=1500, workers=workers, format=format)
    )
    for split in ("train", "val"):
        expected = sequential_tokens(reference, drawn_for(split, documents, 0.2))
        assert expected.size > 0
        np.testing.assert_array_equal(tokens_of(out, split), expected)
    assert len({shard.file.split("_")[1] for shard in manifest.shards}) > 2, "this takes several chunks"
    assert documents_of(out) == len(documents)
    assert sum(shard.utf8_bytes for shard in manifest.shards) == sum(len(utf8_of(document)) for document in documents)
    assert verify(out) == manifest == load_manifest(out)
    if format == "arrow":
        opened = [datasets.Dataset.from_file(str(out / shard.file)) for shard in manifest.shards_of("train")]
        tokens = datasets.concatenate_datasets(opened).with_format("numpy")["tokens"][:]
        np.testing.assert_array_equal(tokens, tokens_of(out, "train"))


@pytest.mark.parametrize("kind", ["saved dataset", "streamed dataset"])
def test_a_small_dataset_is_one_chunk_with_both_splits(tmp_path: Path, kind: str) -> None:
    (tmp_path / "corpus").mkdir()
    options = SOURCES[kind][0](tmp_path / "corpus")
    manifest = tokenize_corpus(TokenizeRequest(**options, out=tmp_path / "out", workers=1, seed=5))
    assert [shard.file for shard in manifest.shards] == ["train_00000_000.npy", "val_00000_000.npy"]


def request_for(tmp_path: Path, name: str = "out", **options: Any) -> TokenizeRequest:
    """Return a request for the JSON Lines corpus, which is written if it does not exist."""
    folder = tmp_path / "corpus"
    if not folder.exists():
        folder.mkdir()
        write_jsonl(folder)
    settings = {"source": "jsonl", "inputs": (str(folder),), "val_fraction": 0.2, "shard_tokens": 2000, "workers": 1}
    return TokenizeRequest(out=tmp_path / name, **{**settings, **options})


@pytest.mark.usefixtures("small_chunks")
def test_the_bytes_do_not_depend_on_workers_encoders_or_the_order_of_chunks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = tokenize_corpus(request_for(tmp_path, "expected", encoder="tiktoken"))
    tokenize_corpus(request_for(tmp_path, "gigatoken", encoder="gigatoken"))
    tokenize_corpus(request_for(tmp_path, "workers", workers=3))

    def in_reverse(work: Any, items: Any, *arguments: Any, **options: Any) -> Any:
        return unordered_map(work, list(items)[::-1], *arguments, **options)

    unordered_map = engines.unordered_map
    monkeypatch.setattr(engines, "unordered_map", in_reverse)
    tokenize_corpus(request_for(tmp_path, "reverse"))
    for name in ("gigatoken", "workers", "reverse"):
        assert result(tmp_path / name) == result(tmp_path / "expected")
    assert expected.made is not None
    made = load_manifest(tmp_path / "gigatoken").made
    assert made is not None
    assert made["encoder"].split()[0] == "gigatoken"
    assert made["reference"].split()[0] == expected.made["encoder"].split()[0] == "tiktoken"
    assert made["checked_documents"] > 0


@pytest.mark.usefixtures("small_chunks")
def test_npy_and_arrow_hold_the_same(tmp_path: Path) -> None:
    npy = tokenize_corpus(request_for(tmp_path, "npy"))
    arrow = tokenize_corpus(request_for(tmp_path, "arrow", format="arrow"))
    assert [shard.tokens for shard in npy.shards] == [shard.tokens for shard in arrow.shards]
    for split in ("train", "val"):
        np.testing.assert_array_equal(tokens_of(tmp_path / "npy", split), tokens_of(tmp_path / "arrow", split))


def test_a_shard_ends_before_the_document_that_would_not_fit(tmp_path: Path) -> None:
    # With END_OF_TEXT the documents have 4, 4, 4, 21, 4 and 4 tokens.
    texts = ["a a a", "b b b", "c c c", " x" * 20, "d d d", "e e e"]
    (tmp_path / "all.jsonl").write_bytes(json_lines(texts))
    options = {"inputs": (str(tmp_path / "all.jsonl"),), "val_fraction": 0, "shard_tokens": 8}
    manifest = tokenize_corpus(request_for(tmp_path, **options))
    assert [shard.tokens for shard in manifest.shards] == [8, 4, 21, 8]
    assert [shard.file for shard in manifest.shards] == [f"train_00000_{index:03d}.npy" for index in range(4)]
    assert manifest.report == {"documents_by_log2_tokens": [0, 0, 5, 0, 1], "repeated_documents": 0}


def test_empty_documents_are_skipped_and_limits_hold(tmp_path: Path) -> None:
    (tmp_path / "all.jsonl").write_bytes(json_lines(["", "aa", "", "éé", "bb", "cc"]))

    def documents(name: str, **limits: int) -> int:
        tokenize_corpus(request_for(tmp_path, name, inputs=(str(tmp_path / "all.jsonl"),), **limits))
        return documents_of(tmp_path / name)

    assert documents("all") == 4
    assert documents("two", limit_documents=2) == 2
    assert documents("bytes 6", limit_bytes=6) == 2
    assert documents("bytes 7", limit_bytes=7) == 3
    assert documents("both", limit_bytes=7, limit_documents=1) == 1
    assert documents("more than there are", limit_documents=5) == 4


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("limit", [{"limit_documents": 37}, {"limit_bytes": 20_000}])
def test_a_limit_ends_at_the_same_document_whatever_the_chunks(
    tmp_path: Path, reference: tiktoken.Encoding, limit: dict[str, int]
) -> None:
    documents = [document for document in DOCUMENTS if document]
    sizes = np.cumsum([len(utf8_of(document)) for document in documents])
    count = limit.get("limit_documents", int(np.searchsorted(sizes, 20_000)) + 1)
    assert count < len(documents)
    tokenize_corpus(request_for(tmp_path, **limit))
    for split in ("train", "val"):
        expected = sequential_tokens(reference, drawn_for(split, documents[:count], 0.2))
        np.testing.assert_array_equal(tokens_of(tmp_path / "out", split), expected)


class Watcher:
    """Records the progress."""

    def __init__(self) -> None:
        self.seen: list[Contents] = []

    def planned(self, estimate: Estimate) -> None:
        assert not self.seen

    def progressed(self, progress: Contents) -> None:
        self.seen.append(progress)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("workers", [1, 2])
def test_progress_grows_to_the_totals_of_the_manifest(tmp_path: Path, workers: int) -> None:
    watcher = Watcher()
    manifest = tokenize_corpus(request_for(tmp_path, workers=workers), watcher)
    assert watcher.seen[0] == Contents(0, 0, 0)
    assert watcher.seen == sorted(watcher.seen, key=lambda progress: progress.documents)
    assert watcher.seen[-1] == Contents(
        sum(shard.documents for shard in manifest.shards),
        sum(shard.tokens for shard in manifest.shards),
        sum(shard.utf8_bytes for shard in manifest.shards),
    )


def test_a_small_corpus_has_both_splits_unless_it_is_a_single_document(tmp_path: Path) -> None:
    def splits(name: str, texts: list[str], **options: Any) -> dict[str, int]:
        (tmp_path / f"{name}.jsonl").write_bytes(json_lines(texts))
        options = {"val_fraction": 0.01, "inputs": (str(tmp_path / f"{name}.jsonl"),), **options}
        manifest = tokenize_corpus(request_for(tmp_path, name, **options))
        return {shard.split: shard.documents for shard in manifest.shards}

    assert splits("two", ["one", "two"]) == {"train": 1, "val": 1}
    assert splits("nearly all", ["one", "two"], val_fraction=0.999999999) == {"train": 1, "val": 1}
    assert splits("one", ["one"]) == {"train": 1}
    assert splits("one of one", ["one"], val_fraction=0.999999999) == {"train": 1}
    assert splits("equal", ["one"] * 5) == {"train": 5}
    assert splits("refrain", ["one", "two", "one"]) == {"train": 2, "val": 1}
    assert splits("refrain twice", ["one", "two", "two", "one"]) == {"train": 2, "val": 2}
    assert splits("refrain left out", ["one", "two", "one"], deduplicate="exact") == {"train": 1, "val": 1}
    assert splits("none wanted", ["one", "two"], val_fraction=0) == {"train": 2}


def test_another_seed_is_another_division(tmp_path: Path) -> None:
    manifest = tokenize_corpus(request_for(tmp_path))
    assert tokenize_corpus(request_for(tmp_path, "other", seed=1)).shards_of("val") != manifest.shards_of("val")


# Folders that are complete already


def test_a_complete_folder_is_returned_untouched(tmp_path: Path) -> None:
    request = request_for(tmp_path)
    assert find_complete(request) is None
    assert not request_for(tmp_path).out.exists()  # type: ignore[union-attr]
    manifest = tokenize_corpus(request)
    before = states((tmp_path / "out").iterdir())
    watcher = Watcher()
    assert find_complete(request) == manifest
    assert tokenize_corpus(request_for(tmp_path, workers=2, encoder="tiktoken"), watcher) == manifest
    assert watcher.seen == []
    assert states((tmp_path / "out").iterdir()) == before


def test_a_changed_input_is_another_request(tmp_path: Path) -> None:
    tokenize_corpus(request_for(tmp_path))
    (tmp_path / "corpus" / "more.jsonl").write_bytes(json_lines(["more"]))
    with pytest.raises(DataError, match=r"source\.options\.files was 1, now it is 2"):
        tokenize_corpus(request_for(tmp_path))


@pytest.mark.parametrize("source", ["text", "parquet"])
def test_files_that_came_since_the_last_run_of_this_process_are_read(
    tmp_path: Path, reference: tiktoken.Encoding, source: str
) -> None:
    """Repeat a request in the same process, as in a notebook, with an empty output folder and more input files."""

    def write(name: str) -> None:
        path = tmp_path / "corpus" / name
        if source == "text":
            path.write_text(name)
        else:
            pq.write_table(pa.table({"text": [name]}), path)

    (tmp_path / "corpus").mkdir()
    request = request_for(tmp_path, source=source, val_fraction=0)
    for names in (["b.parquet"], ["a.parquet", "b.parquet", "c.parquet"]):
        for name in names:
            write(name)
        tokenize_corpus(request)
        np.testing.assert_array_equal(tokens_of(tmp_path / "out"), sequential_tokens(reference, names))
        for path in (tmp_path / "out").iterdir():
            path.unlink()


def test_the_tokens_can_be_trained_on_without_reading_the_rest(tmp_path: Path) -> None:
    tokenize_corpus(request_for(tmp_path))
    stream = open_split(tmp_path / "out", "train")
    assert stream.read_windows(np.array([0, 5]), 4).shape == (2, 4)
