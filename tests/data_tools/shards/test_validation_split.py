"""A validation split that is too small, or far smaller than requested, is described."""

from __future__ import annotations

import pytest

from data_tools.shards.manifest import Manifest, ShardRecord, SourceRecord, TokenizerRecord
from data_tools.shards.validation_split import SMALLEST_VALIDATION_TOKENS, describe_small_validation


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
