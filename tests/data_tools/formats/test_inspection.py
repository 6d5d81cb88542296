"""Tokens of any format are summarized, and their first documents shown."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from data_tools.errors import DataError
from data_tools.formats.inspection import first_documents, inspect
from data_tools.formats.opening import open_collection
from data_tools.tokenizer import load_tokenizer
from tests.support.token_files import (
    END,
    cut,
    documents,
    small_pieces,
    write_ours,
    write_sound,
)


class TestInspect:
    def test_a_folder_of_ours(self, tmp_path: Path) -> None:
        manifest = write_ours(tmp_path / "ours", {"train": [documents(20), documents(5, 1)], "val": [documents(3, 2)]})
        report = inspect(tmp_path / "ours")
        train = report.splits["train"]
        first, second, _ = manifest.shards
        assert (report.format, report.problem, list(report.splits)) == ("native", None, ["train", "val"])
        assert (train.shards, train.documents, train.tokens) == (2, 25, first.tokens + second.tokens)
        assert (train.largest_shard_tokens, train.smallest_shard_tokens) == (first.tokens, second.tokens)
        assert train.bytes_per_token == pytest.approx((first.utf8_bytes + second.utf8_bytes) / train.tokens)
        assert f"{train.tokens:,}" in str(report) and "inputs" in str(report)
        assert json.loads(json.dumps(report.to_json()))["splits"]["train"]["documents"] == 25

    def test_a_damaged_folder_is_reported_too(self, tmp_path: Path) -> None:
        write_ours(tmp_path / "ours", {"train": [documents(20)]})
        cut("train_000000.npy", 2)(tmp_path / "ours")
        report = inspect(tmp_path / "ours")
        assert "train_000000.npy is not a whole shard" in (report.problem or "")
        assert str(report.problem) in str(report) and report.splits["train"].documents == 20

    @pytest.mark.parametrize("format", ["nanogpt", "llmc", "megatron"])
    def test_files_of_other_programs_are_recognized(self, tmp_path: Path, format: str) -> None:
        write_sound(tmp_path / "source", format)
        report = inspect(tmp_path / "source")
        assert report.format == format
        train = report.splits["train"]
        assert (train.tokens, train.documents, train.utf8_bytes) == (
            {"nanogpt": 50, "llmc": 100, "megatron": 8}[format],
            None,
            None,
        )
        assert f"format {format}" in str(report) and "gpt2 is assumed" in str(report)


class TestPreview:
    @staticmethod
    def previews(folder: Path, *, documents: int = 9, characters: int = 99) -> list[tuple[int, str, bool]]:
        found = first_documents(open_collection(folder), "train", documents=documents, characters=characters)
        return [(document.tokens, document.text, document.is_cut) for document in found]

    @pytest.mark.parametrize("behind", [False, True], ids=["before", "behind"])
    def test_documents_with_the_separator_before_or_after(self, behind: bool) -> None:
        texts = ["Hello world", "x", "The quick brown fox jumps over the lazy dog. " * 5]
        encoded = [load_tokenizer().encode(text) for text in texts]
        parts = [part for tokens in encoded for part in ([*tokens, END] if behind else [END, *tokens])]
        with small_pieces() as folder:
            np.array(parts, dtype="<u2").tofile(folder / "train.bin")
            sizes = [tokens.size for tokens in encoded]
            assert self.previews(folder, characters=999) == [(n, it, False) for n, it in zip(sizes, texts, strict=True)]
            assert self.previews(folder, documents=2, characters=5) == [(sizes[0], "Hello", True), (1, "x", False)]
            assert self.previews(folder, characters=30)[2] == (sizes[2], texts[2][:30], True)

    def test_an_empty_document_is_one(self, tmp_path: Path) -> None:
        np.array([END, 15496, END, END, 995], dtype="<u2").tofile(tmp_path / "train.bin")
        assert self.previews(tmp_path) == [(1, "Hello", False), (0, "", False), (1, " world", False)]

    def test_what_cannot_be_decoded(self, byte_corpus: Path, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="is of the tokenizer 'bytes'; only gpt2 can be decoded"):
            self.previews(byte_corpus)
        np.array([1], dtype="<u2").tofile(tmp_path / "val.bin")
        with pytest.raises(DataError, match="has no split 'train'; it has val"):
            self.previews(tmp_path)
