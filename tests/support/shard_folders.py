"""Small folders of shards for tests, and ways to damage their manifests."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_tools.errors import DataError
from data_tools.shards.manifest import Manifest, SourceRecord, TokenizerRecord
from data_tools.shards.reader import open_split
from data_tools.shards.writer import ShardWriter
from data_tools.storage.atomic import write_json_durably

END = 50256


def write_folder(folder: Path, shards: list[np.ndarray], format: str = "npy") -> Manifest:
    """Write one training shard per array, and the manifest."""
    folder.mkdir(exist_ok=True)
    records = []
    for index, tokens in enumerate(shards):
        writer = ShardWriter(folder, f"train_{index:06d}.{format}", "train")
        writer.append(tokens, documents=int((tokens == END).sum()), utf8_bytes=3 * tokens.size)
        records.append(writer.close())
    manifest = Manifest(
        tokenizer=TokenizerRecord("gpt2", 50257, END, "0" * 64),
        source=SourceRecord("text", {"inputs": ["a.txt"]}),
        settings={"format": format},
        shards=tuple(records),
    )
    write_json_durably(folder / "manifest.json", manifest.to_json())
    return manifest


def random_tokens(size: int, seed: int = 0) -> np.ndarray:
    tokens = np.random.default_rng(seed).integers(0, END, size).astype(np.uint16)
    tokens[0] = END
    return tokens


def edit_manifest(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    """Return a function that changes a folder's manifest and removes the manifest's own SHA-256."""
    return edit_sealed_manifest(lambda value: (value.pop("sha256", None), change(value)))


def edit_sealed_manifest(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    """Return a function that changes a folder's manifest and keeps the manifest's own SHA-256."""

    def damage(folder: Path) -> None:
        value = json.loads((folder / "manifest.json").read_text())
        change(value)
        (folder / "manifest.json").write_text(json.dumps(value))

    return damage


def label(value: object) -> str:
    """Return the id of a test's argument. It must be the same in every process, so it has no address of a function."""
    return value[:40] if isinstance(value, str) else "damage"


def require_refused(folder: Path, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        open_split(folder, "train")
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)
