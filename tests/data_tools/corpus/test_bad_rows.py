"""Check that rows that cannot be read end a request, or are left out and reported, in any division of the work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from data_tools.corpus.run import Observer, TokenizeRequest, tokenize_corpus, tokenize_share
from data_tools.errors import DataError
from data_tools.shards.contents import Contents
from tests.data_tools.conftest import documents_of, json_lines, result, varied_documents

GOOD = varied_documents(60)
BAD = [b'{"text": 1}\n', b'{"text": "cut of\n', b'{"text": "\xff"}\n', b'{"body": "x"}\n', b"[1, 2]\n", b'"text"\n']


def request_for(folder: Path, out: str, **options: Any) -> TokenizeRequest:
    """Return a request for 60 lines with a text, and a bad line before every third of them."""
    path = folder / "a.jsonl"
    lines = json_lines(GOOD).splitlines(keepends=True)
    path.write_bytes(b"".join(BAD[n // 3 % 6] * (n % 3 == 0) + line for n, line in enumerate(lines)))
    options = {"workers": 1, "shard_tokens": 1000, "on_bad_rows": "skip", **options}
    return TokenizeRequest(source="jsonl", inputs=(str(path),), out=folder / out, **options)


class Interrupt(Observer):
    """Interrupts a request after a few chunks."""

    def progressed(self, progress: Contents) -> None:
        if progress.documents > 30:
            raise KeyboardInterrupt


@pytest.mark.usefixtures("small_chunks")
def test_skipped_rows_do_not_change_the_other_documents_and_are_reported(tmp_path: Path) -> None:
    manifest = tokenize_corpus(request_for(tmp_path, "skip"))
    assert documents_of(tmp_path / "skip") == len(GOOD)
    assert manifest.report is not None and manifest.report["bad_rows"] == 20
    path = tmp_path / "a.jsonl"
    expected = [
        f"{path}:1: field 'text' is a number, it must be a string",
        f"{path}:5: not valid JSON",
        f"{path}: byte {path.read_bytes().index(0xFF)} (0xff) is not valid UTF-8",
        f"{path}:13: no field 'text'",
        f"{path}:17: holds a list",
        f"{path}:21: holds a string",
    ]
    first = manifest.report["first_bad_rows"]
    assert len(first) == 10
    for place, beginning in zip(first, expected, strict=False):
        assert place.startswith(beginning)
    assert len({shard.file.split("_")[1] for shard in manifest.shards}) > 2, "this takes several chunks"


@pytest.mark.usefixtures("small_chunks")
def test_workers_shares_and_interruptions_give_the_same_folder(tmp_path: Path) -> None:
    tokenize_corpus(request_for(tmp_path, "one"))
    tokenize_corpus(request_for(tmp_path, "two", workers=2))
    shares = [tokenize_share(request_for(tmp_path, "shares"), share, 2) for share in (1, 0)]
    assert shares[0] is None and shares[1] is not None
    with pytest.raises(KeyboardInterrupt):
        tokenize_corpus(request_for(tmp_path, "again"), Interrupt())
    tokenize_corpus(request_for(tmp_path, "again"))
    for out in ("two", "shares", "again"):
        assert result(tmp_path / out) == result(tmp_path / "one")


@pytest.mark.usefixtures("small_chunks")
def test_limits_and_duplicates_count_only_rows_that_can_be_read(tmp_path: Path) -> None:
    manifest = tokenize_corpus(request_for(tmp_path, "limit", limit_documents=4, deduplicate="exact"))
    assert documents_of(tmp_path / "limit") == 4
    assert manifest.report is not None and manifest.report["bad_rows"] == 2


def test_by_default_the_first_bad_row_ends_the_request_and_the_choice_belongs_to_the_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"a\.jsonl:1: field 'text' is a number"):
        tokenize_corpus(request_for(tmp_path, "stop", on_bad_rows="stop"))
    assert not (tmp_path / "stop").exists()
    tokenize_corpus(request_for(tmp_path, "skip"))
    with pytest.raises(DataError, match=r"another request: source\.options\.on_bad_rows was .skip."):
        tokenize_corpus(request_for(tmp_path, "skip", on_bad_rows="stop"))
    with pytest.raises(DataError, match="--on-bad-rows must be one of stop, skip"):
        request_for(tmp_path, "skip", on_bad_rows="ignore")


def test_a_source_of_bad_rows_has_no_document(tmp_path: Path) -> None:
    request = request_for(tmp_path, "out")
    (tmp_path / "a.jsonl").write_bytes(b"".join(BAD))
    with pytest.raises(DataError) as caught:
        tokenize_corpus(request)
    assert "no document with text in it; 6 rows cannot be read, the first is " in str(caught.value)
    assert f"{tmp_path}/a.jsonl:1: field 'text' is a number" in str(caught.value)


def test_empty_documents_are_counted(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(json_lines(["a", "", "b", ""]))
    inputs = (str(tmp_path / "a.jsonl"),)
    manifest = tokenize_corpus(TokenizeRequest(source="jsonl", inputs=inputs, out=tmp_path / "out", workers=1))
    assert documents_of(tmp_path / "out") == 2
    assert manifest.report is not None and manifest.report["empty_documents"] == 2
