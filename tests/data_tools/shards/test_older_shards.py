"""Shards that an earlier version of this project wrote are still read as what they are.

The folders in ``tests/data/before_rooms`` were written once and never change. All expected values are literals.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from data_tools.formats.inspection import first_documents
from data_tools.formats.opening import open_collection
from data_tools.shards.manifest import ShardRecord, load_manifest
from data_tools.shards.reader import open_split
from data_tools.shards.verification import verify

FOLDERS = Path(__file__).resolve().parents[2] / "data" / "before_rooms"


@dataclass(frozen=True)
class Expected:
    shards: tuple[ShardRecord, ...]
    content_sha256: str
    tokens_sha256: dict[str, str]  # by split, of the uint16 tokens
    beginnings: dict[str, list[str]]  # by split, the first 20 characters of its first documents


TEXT_TOKENS = {
    "train": "de5a02a6322939f24f83d5594182a85b795c746ed6088741f92b2ab83b7dc308",
    "val": "5edd15fb57e9d390fd73996ceed2a76410d1f5a23eb11744d8755ad07adf4d00",
}
TEXT_BEGINNINGS = {"train": ["The first document.\n", "x = 1\nx = 1\nx = 1\nx "], "val": ["Ein zweites Dokument"]}
EXPECTED = {
    "shards_npy": Expected(
        (
            ShardRecord(
                "train_00000_000.npy",
                "train",
                312,
                2,
                840,
                "3973a64f59e240749145e8478c489b60e1117431afd8805a8ed7da575b56e6f2",
            ),
            ShardRecord(
                "val_00000_000.npy",
                "val",
                426,
                1,
                1050,
                "c163f579d2ce519a60f6d97caa974388361c816f9583b82604d38a44f3fa372f",
            ),
        ),
        "4c38c77f7013b12edf39469718c7802e6881de94f0495c85664d36ad46475185",
        TEXT_TOKENS,
        TEXT_BEGINNINGS,
    ),
    "shards_arrow": Expected(
        (
            ShardRecord(
                "train_00000_000.arrow",
                "train",
                312,
                2,
                840,
                "09a80468ed27f6d77ed93f02527da1e30b006bef1b064907c39fda593704be2f",
            ),
            ShardRecord(
                "val_00000_000.arrow",
                "val",
                426,
                1,
                1050,
                "c9a3aa8e0595891320b87bdf4aa35899cd7a2c40cde2df3298889ddd0c8db288",
            ),
        ),
        "c1226a2f249420d108eb0dc55c9a705d11b549df736c4616d1654364020fa48e",
        TEXT_TOKENS,
        TEXT_BEGINNINGS,
    ),
    "shards_masked": Expected(
        (
            ShardRecord(
                "train_00000_000.npy",
                "train",
                160,
                10,
                456,
                "08da0a10df5e03e587ed50578887fd9e97eded24fcd48eb9da55ddf8f0cc0bdf",
                "d41ca3d4b4523046d8bd5a404d34d86013cd555e0a1748dd017c2bd23a4b4b21",
            ),
            ShardRecord(
                "val_00000_000.npy",
                "val",
                32,
                2,
                90,
                "fa0ccc0082196220d3caf316a2d92b7fb46c1069d4f49d228ae0b94530d728fa",
                "3241bbffc793ea3ea8d69ea49c98e0fcad42467f5321f00987d851ae5403d71a",
            ),
        ),
        "fcd6e9a8da04307772d0ea1b54ca3b847d1cfdb14e23c45b5bc385d73b7eb7cf",
        {
            "train": "93ba06f4d43654a888e974dc65f9ba66e0eabd427db89a6ca10c0f029cc963e3",
            "val": "f852f1da283b5455f67b64eac231df45027952dc9de59334dca3833bc74c88b5",
        },
        {"train": ["### Instruction:\nAdd"] * 10, "val": ["### Instruction:\nAdd"] * 2},
    ),
}


@pytest.mark.parametrize("name", list(EXPECTED))
class TestOlderShards:
    def test_the_manifest_is_read_as_before(self, name: str) -> None:
        manifest = load_manifest(FOLDERS / name)
        assert manifest.shards == EXPECTED[name].shards
        assert manifest.splits() == ("train", "val")
        assert manifest.tokenizer.vocab_size == 50257
        assert manifest.content_sha256() == EXPECTED[name].content_sha256

    def test_the_manifest_is_written_byte_for_byte_as_before(self, name: str) -> None:
        assert load_manifest(FOLDERS / name).to_bytes() == (FOLDERS / name / "manifest.json").read_bytes()

    def test_it_verifies(self, name: str) -> None:
        assert verify(FOLDERS / name) == load_manifest(FOLDERS / name)

    @pytest.mark.parametrize("split", ["train", "val"])
    def test_tokens_and_text(self, name: str, split: str) -> None:
        stream = open_split(FOLDERS / name, split)
        tokens = stream.read(0, stream.tokens)
        assert hashlib.sha256(tokens.tobytes()).hexdigest() == EXPECTED[name].tokens_sha256[split]
        documents = first_documents(open_collection(FOLDERS / name), split, documents=20, characters=20)
        assert [document.text for document in documents] == EXPECTED[name].beginnings[split]


@pytest.mark.parametrize(("split", "documents"), [("train", 10), ("val", 2)])
def test_masks(split: str, documents: int) -> None:
    """Scored are ``<|endoftext|>`` and the one token of the answer, of 16 per document."""
    stream = open_split(FOLDERS / "shards_masked", split)
    assert stream.has_mask and not open_split(FOLDERS / "shards_npy", split).has_mask
    mask = stream.read_mask_windows(np.array([0]), stream.tokens)[0]
    assert mask.tolist() == ([True] + [False] * 14 + [True]) * documents
