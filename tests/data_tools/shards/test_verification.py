"""``verify`` recomputes everything that the manifest says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from data_tools.errors import DataError
from data_tools.shards.reader import open_split
from data_tools.shards.verification import verify
from tests.support.shard_folders import edit_manifest, random_tokens, write_folder
from tests.support.token_files import (
    documents,
    put,
    write_ours,
)


def test_verify_accepts_what_was_written(tmp_path: Path, format: str) -> None:
    manifest = write_folder(tmp_path / "data", [random_tokens(1000), random_tokens(10)], format)
    assert verify(tmp_path / "data") == manifest


def test_verify_sees_one_changed_bit(tmp_path: Path, format: str) -> None:
    write_folder(tmp_path / "data", [random_tokens(1000)], format)
    path = tmp_path / "data" / f"train_000000.{format}"
    content = bytearray(path.read_bytes())
    content[1000] ^= 1
    path.write_bytes(content)
    open_split(tmp_path / "data", "train")
    with pytest.raises(DataError, match=f"train_000000.{format}: its SHA-256"):
        verify(tmp_path / "data")


def test_verify_counts_documents(tmp_path: Path) -> None:
    write_folder(tmp_path / "data", [random_tokens(1000)])
    edit_manifest(lambda value: value["shards"][0].update(documents=2))(tmp_path / "data")
    with pytest.raises(DataError, match="holds 1 documents.*says 2"):
        verify(tmp_path / "data")


class TestVerify:
    @pytest.mark.parametrize("workers", [1, 2, 7])
    def test_any_number_of_threads(self, tmp_path: Path, workers: int) -> None:
        shards = [documents(20, seed) for seed in range(5)]
        manifest = write_ours(tmp_path / "ours", {"train": shards})
        told: list[int] = []
        assert verify(tmp_path / "ours", workers, told.append) == manifest
        assert sum(told) == sum((tmp_path / "ours" / shard.file).stat().st_size for shard in manifest.shards)
        for name in ("train_000001.npy", "train_000003.npy"):
            put(name, 200, "<H", 7)(tmp_path / "ours")
        with pytest.raises(DataError, match=r"train_000001\.npy: its SHA-256"):
            verify(tmp_path / "ours", workers)

    def test_bytes_of_text_are_counted_again(self, tmp_path: Path) -> None:
        write_ours(tmp_path / "ours", {"train": [documents(20)]})
        path = tmp_path / "ours" / "manifest.json"
        value = json.loads(path.read_text())
        del value["sha256"]
        value["shards"][0]["utf8_bytes"] += 1
        path.write_text(json.dumps(value))
        with pytest.raises(DataError, match=r"train_000000\.npy holds \d+ bytes of text, manifest\.json says"):
            verify(tmp_path / "ours")
