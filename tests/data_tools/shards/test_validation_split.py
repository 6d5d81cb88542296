"""A validation split that is too small, or far smaller than requested, is described."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest

from data_tools.corpus.split import draw_split
from data_tools.shards.manifest import Manifest, ShardRecord, SourceRecord, TokenizerRecord
from data_tools.shards.validation_split import (
    SMALLEST_VALIDATION_TOKENS,
    advise_larger_validation,
    describe_small_validation,
)


def manifest_of(train: int, val: int, **settings: object) -> Manifest:
    shards = [
        ShardRecord(f"{name}.npy", name, size, 5, size, "0" * 64) for name, size in (("train", train), ("val", val))
    ]
    tokenizer = TokenizerRecord("gpt2", 50257, 50256, "0" * 64)
    return Manifest(tokenizer, SourceRecord("text", {}), settings, tuple(shard for shard in shards if shard.tokens))


@pytest.mark.parametrize(
    ("train", "val", "settings", "expected"),
    [
        (10**9, 10**7, {"val_fraction": 0.01}, None),
        (10**9, 0, {"val_fraction": 0.01}, None),
        (10**9, SMALLEST_VALIDATION_TOKENS, {}, None),
        (10**9, 10**7, {"val_fraction": 0.0}, None),
        (10**6, SMALLEST_VALIDATION_TOKENS - 1, {}, "losses on fewer than 16,384 tokens are noisy"),
        (10**9, 2 * 10**5, {"val_fraction": 0.01}, "0.02% of all tokens; --val-fraction 0.01 of the documents were"),
    ],
)
def test_a_small_split_is_described(train: int, val: int, settings: dict[str, object], expected: str | None) -> None:
    found = describe_small_validation(manifest_of(train, val, **settings))
    assert found is None if expected is None else expected in str(found)


def drawn_manifest(lengths: list[int], fraction: float, seed: int) -> Manifest:
    """Return the manifest of documents with these lengths in tokens, after ``tokenize`` has drawn the splits."""
    splits = [draw_split(str(i).encode(), val_fraction=fraction, seed=seed) for i in range(len(lengths))]
    shards = []
    for split in ("train", "val"):
        drawn = [length for length, of in zip(lengths, splits, strict=True) if of == split]
        shards.append(ShardRecord(f"{split}.npy", split, sum(drawn), len(drawn), sum(drawn), "0" * 64))
    tokenizer = TokenizerRecord("gpt2", 50257, 50256, "0" * 64)
    settings = {"val_fraction": fraction}
    return Manifest(tokenizer, SourceRecord("text", {}), settings, tuple(shard for shard in shards if shard.tokens))


def test_the_advice_cures() -> None:
    """The lengths of the documents are as different as those of web pages."""
    followed = []
    for corpus in range(60):
        draw = np.random.default_rng(corpus)
        lengths = [int(length) for length in draw.lognormal(6.5, 1, int(draw.integers(20, 1000)))]
        fraction, seed = 0.01, 0
        while advice := advice_for(drawn_manifest(lengths, fraction, seed)):
            followed.append(corpus)
            if found := re.search(r"with --val-fraction ([\d.e-]+)$", advice):
                assert float(found[1]) > fraction, "the advice does not repeat itself"
                fraction = float(found[1])
            if more := re.search(r"([\d,]+) tokens in (\d+) documents suffice", advice):
                share = max(int(more[1].replace(",", "")) / sum(lengths), int(more[2]) / len(lengths))
                lengths = lengths * math.ceil(share)
            if advice.endswith("another --seed"):
                seed += 1
    assert len(set(followed)) > 30, "these corpora had too small a split"
    assert len(followed) <= 1.1 * len(set(followed)), "almost always, it suffices to follow the advice once"


def advice_for(manifest: Manifest) -> str | None:
    """Return what the command says if the split is too small or empty."""
    return describe_small_validation(manifest) if "val" in manifest.splits() else advise_larger_validation(manifest)
