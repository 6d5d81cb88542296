"""Masks say which tokens are scored, and are checked like the tokens."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_tools.errors import DataError
from data_tools.shards.manifest import Manifest, ShardRecord, load_manifest
from data_tools.shards.reader import open_split
from data_tools.shards.verification import require_unchanged, verify
from data_tools.shards.writer import ShardWriter
from data_tools.storage.atomic import write_json_durably
from tests.support.shard_folders import edit_manifest, random_tokens, write_folder

SIZES = (1000, 3, 1, 50, 700)


def random_mask(size: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random(size) < 0.5


def write_masked_folder(folder: Path, format: str = "npy", pieces: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Write shards of ``SIZES`` with masks, appended in pieces, and return all tokens and all flags."""
    folder.mkdir()
    tokens = [random_tokens(size, size) for size in SIZES]
    masks = [random_mask(size, size) for size in SIZES]
    plain = write_folder(folder, tokens, format)
    records = []
    for index, (shard, mask) in enumerate(zip(tokens, masks, strict=True)):
        writer = ShardWriter(folder, f"train_{index:06d}.{format}", "train")
        for part, scored in zip(np.array_split(shard, pieces), np.array_split(mask, pieces), strict=True):
            writer.append(part, documents=0, utf8_bytes=part.size, scored=scored)
        records.append(writer.close())
    records = [ShardRecord(**{**vars(record), "documents": 1}) for record in records]
    manifest = Manifest(plain.tokenizer, plain.source, plain.settings, tuple(records))
    write_json_durably(folder / "manifest.json", manifest.to_json())
    return np.concatenate(tokens), np.concatenate(masks)


def test_windows_of_the_mask_fit_those_of_the_tokens(tmp_path: Path, format: str) -> None:
    tokens, mask = write_masked_folder(tmp_path / "data", format, pieces=3)
    stream = open_split(tmp_path / "data", "train")
    assert stream.has_mask
    starts = np.array([0, 995, 999, 1000, 1003, 1004, 1053, tokens.size - 64])
    windows = stream.read_mask_windows(starts, 64)
    assert windows.dtype == np.bool_
    np.testing.assert_array_equal(windows, np.stack([mask[start : start + 64] for start in starts]))
    np.testing.assert_array_equal(stream.read_windows(starts, 64), np.stack([tokens[at : at + 64] for at in starts]))
    assert stream.read_mask_windows(np.array([], dtype=np.int64), 4).shape == (0, 4)


def test_numpy_loads_a_mask(tmp_path: Path, format: str) -> None:
    _, mask = write_masked_folder(tmp_path / "data", format)
    loaded = [np.load(path) for path in sorted((tmp_path / "data").glob("*.mask.npy"))]
    assert {array.dtype for array in loaded} == {np.dtype(np.uint8)}
    np.testing.assert_array_equal(np.concatenate(loaded), mask)


def test_the_manifest_has_the_hash_of_the_mask(tmp_path: Path) -> None:
    write_masked_folder(tmp_path / "data")
    record = load_manifest(tmp_path / "data").shards[0]
    assert record.mask_file == "train_000000.mask.npy"
    content = (tmp_path / "data" / "train_000000.mask.npy").read_bytes()
    assert record.mask_sha256 == hashlib.sha256(content).hexdigest()
    assert verify(tmp_path / "data").shards[0] == record


def test_a_manifest_without_masks_has_no_mask_keys(tmp_path: Path) -> None:
    """Manifests of earlier versions and their hashes do not change."""
    manifest = write_folder(tmp_path / "data", [random_tokens(10)])
    keys = ["file", "split", "tokens", "documents", "utf8_bytes", "sha256"]
    assert list(manifest.to_json()["shards"][0]) == keys
    assert not open_split(tmp_path / "data", "train").has_mask
    assert [path.name for path in (tmp_path / "data").glob("*mask*")] == []


def test_an_aborted_shard_leaves_no_mask(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, "train_000000.npy", "train")
    writer.append(random_tokens(10), documents=1, utf8_bytes=1, scored=random_mask(10))
    assert len(list(tmp_path.iterdir())) == 2
    writer.abort()
    assert not list(tmp_path.iterdir())


def test_no_file_of_a_shard_has_its_name_before_it_is_complete(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, "train_000000.npy", "train")
    writer.append(random_tokens(10), documents=1, utf8_bytes=1, scored=random_mask(10))
    assert {path.suffix for path in tmp_path.iterdir()} == {".partial"}
    writer.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["train_000000.mask.npy", "train_000000.npy"]


@pytest.mark.parametrize("masked_first", [True, False])
def test_a_shard_is_masked_from_its_first_document_or_never(tmp_path: Path, masked_first: bool) -> None:
    writer = ShardWriter(tmp_path, "train_000000.npy", "train")
    first, second = (random_mask(10), None) if masked_first else (None, random_mask(10))
    writer.append(random_tokens(10), documents=1, utf8_bytes=1, scored=first)
    with pytest.raises(AssertionError, match="has a mask, or none"):
        writer.append(random_tokens(10), documents=1, utf8_bytes=1, scored=second)
    writer.abort()


def without_masks(*indices: int) -> Callable[[dict[str, Any]], None]:
    def change(manifest: dict[str, Any]) -> None:
        for index in indices:
            del manifest["shards"][index]["mask_sha256"]

    return change


def test_all_shards_of_a_split_have_masks_or_none(tmp_path: Path) -> None:
    write_masked_folder(tmp_path / "data")
    edit_manifest(without_masks(3))(tmp_path / "data")
    with pytest.raises(DataError, match=r"train_000000.npy has a mask and train_000003.npy has none") as caught:
        load_manifest(tmp_path / "data")
    assert "\n" not in str(caught.value)
    edit_manifest(without_masks(0, 1, 2, 4))(tmp_path / "data")
    assert not open_split(tmp_path / "data", "train").has_mask


@pytest.mark.parametrize("value", ["ab", 7, ["a" * 64]], ids=["short", "number", "list"])
def test_a_hash_of_another_kind_is_refused(tmp_path: Path, value: object) -> None:
    write_masked_folder(tmp_path / "data")
    edit_manifest(lambda manifest: manifest["shards"][0].update(mask_sha256=value))(tmp_path / "data")
    with pytest.raises(DataError, match=r"shards\[0\]: mask_sha256"):
        load_manifest(tmp_path / "data")


MASK_FILE = "train_000001.mask.npy"


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (None, "is missing"),
        (np.zeros(2, dtype=np.uint8), "is the mask of 2 tokens, manifest.json says 3"),
        (np.zeros(3, dtype=np.uint16), "not a whole mask of uint8 flags"),
        (np.zeros((3, 1), dtype=np.uint8), "not a whole mask of uint8 flags"),
    ],
    ids=["missing", "short", "other dtype", "other shape"],
)
def test_a_mask_that_does_not_fit_is_refused(tmp_path: Path, mask: np.ndarray | None, message: str) -> None:
    write_masked_folder(tmp_path / "data")
    path = tmp_path / "data" / MASK_FILE
    path.unlink()
    if mask is not None:
        np.save(path, mask)
    with pytest.raises(DataError, match=message) as caught:
        open_split(tmp_path / "data", "train")
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_one_changed_flag_is_noticed(tmp_path: Path) -> None:
    write_masked_folder(tmp_path / "data")
    path = tmp_path / "data" / MASK_FILE
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    manifest = load_manifest(tmp_path / "data")
    require_unchanged(tmp_path / "data", manifest.shards[0])
    for check in (lambda: require_unchanged(tmp_path / "data", manifest.shards[1]), lambda: verify(tmp_path / "data")):
        with pytest.raises(DataError, match=f"{MASK_FILE}: its SHA-256"):
            check()


def test_anything_but_0_and_1_is_refused_when_read(tmp_path: Path) -> None:
    write_masked_folder(tmp_path / "data")
    path = tmp_path / "data" / MASK_FILE
    np.save(path, np.array([0, 1, 2], dtype=np.uint8))
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    edit_manifest(lambda manifest: manifest["shards"][1].update(mask_sha256=sha256))(tmp_path / "data")
    stream = open_split(tmp_path / "data", "train")
    assert stream.read_mask_windows(np.array([990]), 12).shape == (1, 12)
    with pytest.raises(DataError, match="mask of split 'train' holds 2, it may hold 0 and 1"):
        stream.read_mask_windows(np.array([990]), 13)
    with pytest.raises(DataError, match=f"{MASK_FILE} holds 2"):
        verify(tmp_path / "data")


def test_a_mask_that_the_manifest_does_not_name_is_ignored(tmp_path: Path) -> None:
    write_folder(tmp_path / "data", [random_tokens(10)])
    np.save(tmp_path / "data" / "train_000000.mask.npy", np.zeros(10, dtype=np.uint8))
    assert not open_split(tmp_path / "data", "train").has_mask
    assert "mask_sha256" not in json.loads((tmp_path / "data" / "manifest.json").read_text())["shards"][0]
