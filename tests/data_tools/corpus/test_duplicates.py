"""Check that only the first of equal documents is kept, in whichever chunks they are."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import tiktoken
from hypothesis import given
from hypothesis import strategies as st

from data_tools.corpus import duplicates
from data_tools.corpus.chunks import Chunk
from data_tools.corpus.duplicates import write_repeated
from data_tools.corpus.run import TokenizeRequest, tokenize_corpus, tokenize_share
from data_tools.sources import Slice
from tests.data_tools.conftest import drawn_for, json_lines, result, sequential_tokens, tokens_of, varied_documents


class MemoryFolder:
    """The methods of a folder that the comparison needs."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}

    def read(self, name: str) -> bytes:
        return self.files[name]

    def write(self, name: str, content: bytes) -> None:
        self.files[name] = content


def saved(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


@given(
    corpus=st.lists(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), max_size=12), max_size=6),
    documents_at_a_time=st.integers(1, 20),
)
def test_all_but_the_first_of_equal_documents_are_found(
    corpus: list[list[tuple[int, int]]], documents_at_a_time: int
) -> None:
    chunks = [Chunk(index, (Slice("a", index, index + 1),)) for index in range(len(corpus))]
    folder = MemoryFolder()
    for chunk, fingerprints in zip(chunks, corpus, strict=True):
        folder.write(chunk.fingerprints_file, saved(np.array(fingerprints, dtype=np.uint64).reshape(-1, 2)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(duplicates, "_DOCUMENTS_AT_A_TIME", documents_at_a_time)
        write_repeated(folder, chunks)  # type: ignore[arg-type]
    seen: set[tuple[int, int]] = set()
    for chunk, fingerprints in zip(chunks, corpus, strict=True):
        expected = [n for n, one in enumerate(fingerprints) if one in seen or seen.add(one)]  # type: ignore[func-returns-value]
        assert np.load(io.BytesIO(folder.files[chunk.repeated_file])).tolist() == expected


DISTINCT = varied_documents(60)
#: Each of the first twenty is repeated, some in the same chunk and most in a later one.
REPEATING = [
    *DISTINCT[:20],
    *DISTINCT[10:20],
    *DISTINCT[20:40],
    *DISTINCT[:20],
    "",
    *DISTINCT[40:],
    "a\ud800",
    "a\ufffd",
]
KEPT = [*DISTINCT, "a\ud800"]


def request_for(tmp_path: Path, name: str = "out", workers: int = 1, deduplicate: str = "exact") -> TokenizeRequest:
    (tmp_path / "a.jsonl").write_bytes(json_lines(REPEATING))
    return TokenizeRequest(
        source="jsonl",
        inputs=(str(tmp_path / "a.jsonl"),),
        out=tmp_path / name,
        val_fraction=0.2,
        shard_tokens=1000,
        deduplicate=deduplicate,
        workers=workers,
    )


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("workers", [1, 2])
def test_the_first_of_equal_documents_is_kept_across_chunks(
    tmp_path: Path, reference: tiktoken.Encoding, workers: int
) -> None:
    manifest = tokenize_corpus(request_for(tmp_path, workers=workers))
    assert manifest.report is not None
    assert manifest.report["repeated_documents"] == 31
    assert sum(manifest.report["documents_by_log2_tokens"]) == len(KEPT)
    for split in ("train", "val"):
        expected = sequential_tokens(reference, drawn_for(split, KEPT, 0.2))
        np.testing.assert_array_equal(tokens_of(tmp_path / "out", split), expected)
    assert len(result(tmp_path / "out")) > 6


@pytest.mark.usefixtures("small_chunks")
def test_deduplication_belongs_to_the_identity_of_the_request(tmp_path: Path) -> None:
    manifest = tokenize_corpus(request_for(tmp_path, "all", deduplicate="off"))
    assert manifest.report is not None
    assert manifest.report["repeated_documents"] == 0
    assert sum(shard.documents for shard in manifest.shards) == len(REPEATING) - 1
    with pytest.raises(Exception, match=r'settings\.deduplicate was "off", now it is "exact"'):
        tokenize_corpus(request_for(tmp_path, "all"))


@pytest.mark.usefixtures("small_chunks")
def test_shares_take_two_rounds(tmp_path: Path) -> None:
    tokenize_corpus(request_for(tmp_path, "whole"))
    request = request_for(tmp_path)
    # No document is encoded before all are fingerprinted.
    assert [tokenize_share(request, share, 3) for share in (2, 0)] == [None, None]
    assert not list((tmp_path / "out").glob("*.npy"))
    assert tokenize_share(request, 1, 3) is None
    assert list((tmp_path / "out").glob("*.npy"))
    assert tokenize_share(request, 0, 3) is None
    assert tokenize_share(request, 2, 3) is not None
    assert result(tmp_path / "out") == result(tmp_path / "whole")
