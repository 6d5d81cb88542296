"""Check how the documents of a chunk are encoded, compared with tiktoken, divided and written."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiktoken
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from data_tools.arrays import TokenArray
from data_tools.corpus import chunks as chunks_module
from data_tools.corpus import estimate as estimate_module
from data_tools.corpus import run as run_module
from data_tools.corpus import worker as worker_module
from data_tools.corpus.estimate import Estimate
from data_tools.corpus.run import Observer, TokenizeRequest, tokenize_corpus
from data_tools.encoding.encoders import GigatokenEncoder, load_encoder
from data_tools.errors import DataError
from data_tools.shards.contents import Contents
from data_tools.tokenizer import Tokenizer
from data_tools.vocabulary import END_OF_TEXT
from tests.data_tools.conftest import (
    contents,
    drawn_for,
    json_lines,
    result,
    sequential_tokens,
    states,
    tokens_of,
    varied_documents,
)


def request_for(folder: Path, texts: list[str], **options: Any) -> TokenizeRequest:
    (folder / "a.jsonl").write_bytes(json_lines(texts))
    settings = {"shard_tokens": 1000, "workers": 1, **options}
    return TokenizeRequest(source="jsonl", inputs=(str(folder / "a.jsonl"),), out=folder / "out", **settings)


# Whole runs, whatever the documents


@given(
    texts=st.lists(
        st.one_of(
            st.text(st.characters(codec=None), max_size=30),  # surrogates included
            st.sampled_from(["same", "<|endoftext|>", "\u088f's", " " * 300, "It's\n\n\n", "long " * 80]),
        ),
        max_size=30,
    ),
    chunk_bytes=st.integers(1, 600),
    shard_tokens=st.integers(1, 120),
    val_fraction=st.sampled_from([0.0, 0.3]),
    encoder=st.sampled_from(["gigatoken", "tiktoken"]),
)
@settings(max_examples=60, deadline=None)
def test_any_documents_in_any_cut_are_encoded_as_one_after_the_other(
    reference: tiktoken.Encoding,
    texts: list[str],
    chunk_bytes: int,
    shard_tokens: int,
    val_fraction: float,
    encoder: str,
) -> None:
    documents = [text for text in texts if text]
    assume(len(documents) != 1 or not val_fraction)  # a corpus of one text is divided, see test_split.py
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunks_module, "_SMALLEST_CHUNK_BYTES", chunk_bytes)
        patch.setattr(os, "fsync", lambda descriptor: None)  # this test needs no durability
        request = request_for(
            Path(folder), texts, shard_tokens=shard_tokens, val_fraction=val_fraction, encoder=encoder
        )
        if not documents:
            with pytest.raises(DataError, match="no document"):
                tokenize_corpus(request)
            return
        manifest = tokenize_corpus(request)
        assert result(Path(folder, "out"))
        train, val = (tokens_of(Path(folder, "out"), split) for split in ("train", "val"))
    assert all(shard.tokens <= shard_tokens or shard.documents == 1 for shard in manifest.shards)
    if len({shard.file.split("_")[1] for shard in manifest.shards}) > 1:
        expected = [drawn_for(split, documents, val_fraction) for split in ("train", "val")]
        np.testing.assert_array_equal(train, sequential_tokens(reference, expected[0]))
        np.testing.assert_array_equal(val, sequential_tokens(reference, expected[1]))
    each = [tuple(sequential_tokens(reference, [document])) for document in documents]
    divided = [{tuple(document) for document in documents_in(tokens)} for tokens in (train, val)]
    assert not divided[0] & divided[1], "equal documents are in one split"
    assert sorted(map(tuple, [*documents_in(train), *documents_in(val)])) == sorted(each)


def documents_in(tokens: np.ndarray) -> list[np.ndarray]:
    return np.split(tokens, np.flatnonzero(tokens == END_OF_TEXT)[1:]) if tokens.size else []


# The sample check


class WrongEncoder(GigatokenEncoder):
    """Encodes texts about strawberries wrongly."""

    def encode(self, text: str) -> TokenArray:
        tokens = super().encode(text)
        return tokens[::-1] if "strawberry" in text else tokens


@pytest.fixture
def wrong_encoder(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = WrongEncoder()
    monkeypatch.setattr(worker_module, "load_encoder", lambda name: load_encoder(name) if name == "tiktoken" else wrong)


@pytest.mark.usefixtures("wrong_encoder", "small_chunks")
def test_a_wrong_encoder_stops_the_run_and_the_document_is_named(tmp_path: Path) -> None:
    texts = ["How many letters has a strawberry?", *varied_documents(60)]
    request = request_for(tmp_path, texts)
    with pytest.raises(DataError) as caught:
        tokenize_corpus(request)
    sha256 = hashlib.sha256(texts[0].encode()).hexdigest()[:32]
    assert str(caught.value).startswith(f"chunk 0 ({tmp_path}/a.jsonl[0:")
    expected = (
        f": gigatoken and tiktoken encode document 0 (SHA-256 {sha256}...) differently; the chunk was not written"
    )
    assert expected in str(caught.value)
    assert str(caught.value).endswith("use --encoder tiktoken")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()
    manifest = tokenize_corpus(request_for(tmp_path, texts, encoder="tiktoken"))
    assert manifest.made is not None
    assert manifest.made["checked_documents"] == 0


@pytest.mark.usefixtures("wrong_encoder", "small_chunks")
def test_documents_within_a_chunk_are_checked_at_random_and_finished_chunks_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_module, "_CHECK_ONE_IN", 1)
    texts = [*varied_documents(60), "strawberry"]
    with pytest.raises(DataError, match=r"chunk \d+ .*: gigatoken and tiktoken encode document [1-9]\d* \(SHA-256"):
        tokenize_corpus(request_for(tmp_path, texts))
    plan = json.loads((tmp_path / "out" / "plan.json").read_bytes())
    assert len(list((tmp_path / "out" / "tasks").iterdir())) == len(plan["tasks"]) - 1
    assert not any(f"_{len(plan['tasks']) - 1:05d}_" in name for name in contents(tmp_path / "out"))
    tokenize_corpus(request_for(tmp_path, texts, encoder="tiktoken"))
    assert result(tmp_path / "out")


@pytest.mark.usefixtures("small_chunks")
def test_the_first_document_of_each_chunk_that_is_encoded_is_checked(tmp_path: Path) -> None:
    texts = varied_documents(60)
    manifest = tokenize_corpus(request_for(tmp_path, ["", *texts, *texts[:3]], deduplicate="exact"))
    assert manifest.made is not None
    chunks = {shard.file.split("_")[1] for shard in manifest.shards}
    assert len(chunks) <= manifest.made["checked_documents"] < len(chunks) + 5


def test_tiktoken_encodes_only_the_beginning_of_a_long_document(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_module, "_CHECKED_CHARACTERS", 100)
    monkeypatch.setattr(estimate_module, "_SAMPLE_BYTES", 100)
    encoded: list[int] = []
    encode = Tokenizer.encode

    def watch(self: Tokenizer, text: str) -> TokenArray:
        encoded.append(len(text))
        return encode(self, text)

    monkeypatch.setattr(Tokenizer, "encode", watch)
    manifest = tokenize_corpus(request_for(tmp_path, ["word " * 5000]))
    assert manifest.made is not None
    assert manifest.made["checked_documents"] == 1
    assert len(encoded) == 2  # for the estimate and for the check
    assert max(encoded) <= 100


@pytest.mark.usefixtures("wrong_encoder")
def test_a_wrong_beginning_of_a_long_document_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_module, "_CHECKED_CHARACTERS", 100)
    with pytest.raises(DataError, match="gigatoken and tiktoken encode document 0"):
        tokenize_corpus(request_for(tmp_path, ["strawberry " * 5000], val_fraction=0.0))


# A source that changes while it is read


def test_files_that_change_while_a_run_reads_them_end_it(tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "b.txt").write_text("b")

    class AddAFile:
        def planned(self, estimate: Estimate) -> None:
            (folder / "a.txt").write_text("a")

        def progressed(self, progress: Contents) -> None:
            pass

    request = TokenizeRequest(source="text", inputs=(str(folder),), out=tmp_path / "out", workers=1)
    with pytest.raises(DataError, match="--source text: its files changed while this command read them"):
        tokenize_corpus(request, AddAFile())
    assert not (tmp_path / "out").exists()
    assert tokenize_corpus(request).shards


@pytest.mark.usefixtures("small_chunks")
def test_a_file_that_becomes_shorter_between_two_documents_ends_the_run(tmp_path: Path) -> None:
    path, out = tmp_path / "a.jsonl", tmp_path / "out"
    lines = [json_lines([f"Document {number}. " * 100]) for number in range(20)]
    path.write_bytes(b"".join(lines))

    class Truncate:
        def planned(self, estimate: Estimate) -> None:
            assert estimate.chunks > 2

        def progressed(self, progress: Contents) -> None:
            if progress.documents:
                path.write_bytes(b"".join(lines[:10]))

    request = TokenizeRequest(source="jsonl", inputs=(str(path),), out=out, workers=1)
    with pytest.raises(DataError, match=f"they no longer change, delete {out} if it exists, and repeat the"):
        tokenize_corpus(request, Truncate())
    shutil.rmtree(out)
    assert sum(shard.documents for shard in tokenize_corpus(request).shards) == 10


class Late(Observer):
    """Calls a function after the first documents, and keeps the notices."""

    def __init__(self, act: Callable[[], object]) -> None:
        self.lines: list[str] = []
        self._act = act

    def noticed(self, line: str) -> None:
        self.lines.append(line)

    def progressed(self, progress: Contents) -> None:
        if progress.documents:
            self._act()


def folder_request(tmp_path: Path) -> TokenizeRequest:
    folder = tmp_path / "texts"
    folder.mkdir()
    for name in "ac":
        (folder / f"{name}.txt").write_text(f"The text {name}.")
    return TokenizeRequest(source="text", inputs=(str(folder),), out=tmp_path / "out", workers=1, val_fraction=0.0)


def test_a_file_that_appears_after_the_input_is_opened_is_left_out(tmp_path: Path) -> None:
    request = folder_request(tmp_path)
    late = Late(lambda: (tmp_path / "texts" / "b.txt").write_text("b"))
    assert sum(shard.documents for shard in tokenize_corpus(request, late).shards) == 2
    new = f"1 file appeared while this command read the others, such as {tmp_path}/texts/b.txt"
    assert late.lines == [f"{new}; the shards do not contain them"]


def test_a_file_that_disappears_ends_the_run(tmp_path: Path) -> None:
    request = folder_request(tmp_path)
    late = Late(lambda: (tmp_path / "texts" / "a.txt").unlink(missing_ok=True))
    with pytest.raises(DataError, match="--source text: its files changed while this command read them"):
        tokenize_corpus(request, late)


def test_an_input_that_cannot_be_listed_at_the_end_loses_no_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = folder_request(tmp_path)

    def fail(request: TokenizeRequest) -> None:
        raise DataError("no answer")

    with monkeypatch.context() as patched, pytest.raises(DataError, match="no answer"):
        tokenize_corpus(request, Late(lambda: patched.setattr(run_module, "open_source", fail)))
    written = states((tmp_path / "out").glob("*.npy"))
    assert written
    tokenize_corpus(request)
    assert states(written) == written
