"""Check that chunks are reproducible and hold every document once, in order, up to the limit."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from data_tools.corpus import chunks as chunks_module
from data_tools.corpus.chunks import Chunk, documents_of, plan_chunks
from data_tools.corpus.request import TokenizeRequest
from data_tools.encoding.documents import utf8_of
from data_tools.sources import OnBadRow, Slice, stop_at_bad_row
from data_tools.sources.files import FileSizes


class ListSource:
    """A source of the documents in a list, one per slice."""

    def __init__(self, documents: Sequence[str], *, sizes_known: bool = True) -> None:
        self.files: FileSizes = ()
        self._documents = documents
        self._sizes_known = sizes_known

    def options(self) -> dict[str, Any]:
        return {}

    def text_bytes(self) -> int | None:
        return sum(len(utf8_of(document)) for document in self._documents) if self._sizes_known else None

    def slices(self, slice_bytes: int) -> list[Slice]:
        sizes = [len(utf8_of(document)) if self._sizes_known else None for document in self._documents]
        return [Slice("list", index, index + 1, size) for index, size in enumerate(sizes)]

    def read(self, source_slice: Slice, on_bad_row: OnBadRow = stop_at_bad_row) -> Iterator[str]:
        yield from self._documents[source_slice.start : source_slice.stop]


def plan(documents: Sequence[str], *, sizes_known: bool = True, **options: Any) -> tuple[list[Chunk], list[list[str]]]:
    """Return the chunks, and the documents that each of them yields."""
    source = ListSource(documents, sizes_known=sizes_known)
    request = TokenizeRequest(source="jsonl", inputs=("a",), out="out", **options)
    chunks = plan_chunks(source, request)
    return chunks, [[str(document) for document in documents_of(chunk, source, request)] for chunk in chunks]


@pytest.fixture(autouse=True)
def tiny_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks_module, "_SMALLEST_CHUNK_BYTES", 10)


DOCUMENTS = st.lists(st.sampled_from(["", "a", "é", "four", "a dozen bytes", "x" * 50]), max_size=40)


@given(documents=DOCUMENTS, sizes_known=st.booleans(), shard_tokens=st.integers(1, 100))
@example(documents=["", "longer than a chunk"], sizes_known=True, shard_tokens=1)
def test_every_document_with_text_is_in_one_chunk_in_order(
    documents: list[str], sizes_known: bool, shard_tokens: int
) -> None:
    chunks, texts = plan(documents, sizes_known=sizes_known, shard_tokens=shard_tokens)
    assert sum(texts, []) == [document for document in documents if document]
    assert [chunk.index for chunk in chunks] == list(range(len(chunks)))
    largest = max(10, 4 * shard_tokens)
    for chunk, yielded in zip(chunks, texts, strict=True):
        assert sum(map(len, map(utf8_of, yielded))) <= largest or len(chunk.slices) == 1


@given(documents=DOCUMENTS, limit=st.integers(1, 50))
def test_the_limit_of_documents_is_exact_across_chunks(documents: list[str], limit: int) -> None:
    _, texts = plan(documents, limit_documents=limit)
    assert sum(texts, []) == [document for document in documents if document][:limit]


@given(documents=DOCUMENTS, limit=st.integers(1, 300))
def test_the_limit_of_bytes_is_reached_by_the_last_document(documents: list[str], limit: int) -> None:
    _, texts = plan(documents, limit_bytes=limit)
    taken = sum(texts, [])
    everything = [document for document in documents if document]
    assert taken == everything[: len(taken)]
    sizes = [len(document.encode()) for document in taken]
    assert sum(sizes[:-1]) < limit
    assert sum(sizes) >= limit or len(taken) == len(everything)


def test_the_limit_that_is_reached_first_applies() -> None:
    documents = ["aa", "bb", "cc", "dd"]
    assert plan(documents, limit_documents=3, limit_bytes=4)[1] == [["aa", "bb"]]
    assert sum(plan(documents, limit_documents=1, limit_bytes=4)[1], []) == ["aa"]


def test_a_chunk_of_a_large_source_fills_a_shard_and_a_small_source_has_few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks_module, "_SMALLEST_CHUNK_BYTES", 1000)
    monkeypatch.setattr(chunks_module, "_WANTED_CHUNKS", 8)

    def sizes(documents: int, shard_tokens: int = 10_000) -> list[int]:
        return [sum(map(len, texts)) for texts in plan(["x" * 100] * documents, shard_tokens=shard_tokens)[1]]

    assert sizes(9) == [900]  # too little to divide
    assert sizes(800) == [10_000] * 8  # as many as keep the cores busy
    assert sizes(8000, shard_tokens=500) == [2000] * 400  # 500 tokens are about 2000 bytes


def test_a_chunk_survives_json() -> None:
    chunk = Chunk(7, (Slice("ü\udcff.jsonl", 5, 9, 4), Slice("b", 0, 1)), limit_documents=3)
    assert Chunk.from_json(json.loads(json.dumps(asdict(chunk)).encode("ascii"))) == chunk
    assert chunk.name == "00007"
    assert str(Chunk(7, chunk.slices[:1])) == "chunk 7 (ü\udcff.jsonl[5:9])"
    assert str(chunk).endswith("[5:9], ...)")


def test_names_of_chunks_sort_as_chunks_do() -> None:
    names = [Chunk(index, ()).name for index in (0, 9, 10, 99_999)]
    assert names == sorted(names)
