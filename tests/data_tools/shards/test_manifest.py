"""A manifest is written and read unchanged, and a wrong one is refused in one line."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from data_tools.errors import DataError
from data_tools.shards.manifest import load_manifest
from data_tools.shards.verification import verify
from tests.support.shard_folders import (
    edit_manifest,
    edit_sealed_manifest,
    label,
    random_tokens,
    require_refused,
    write_folder,
)


def test_the_manifest_survives_a_round_trip(tmp_path: Path) -> None:
    manifest = write_folder(tmp_path / "data", [random_tokens(10), random_tokens(7)])
    assert load_manifest(tmp_path / "data") == manifest
    assert manifest.splits() == ("train",)
    assert manifest.tokens_of("train") == 17
    content = (tmp_path / "data" / "train_000001.npy").read_bytes()
    assert manifest.shards[1].sha256 == hashlib.sha256(content).hexdigest()


class TestSeal:
    def test_it_is_the_last_key_and_covers_all_others(self, tmp_path: Path) -> None:
        manifest = write_folder(tmp_path / "data", [random_tokens(10)])
        value = json.loads((tmp_path / "data" / "manifest.json").read_text())
        assert value == json.loads(json.dumps(manifest.to_json()))
        seal = value.popitem()
        assert seal == ("sha256", hashlib.sha256(json.dumps(value).encode()).hexdigest())

    def test_a_manifest_without_one_is_accepted(self, tmp_path: Path) -> None:
        """Other programs write manifests without it, and early versions of this one did."""
        manifest = write_folder(tmp_path / "data", [random_tokens(10)])
        edit_manifest(lambda value: None)(tmp_path / "data")
        assert load_manifest(tmp_path / "data") == manifest
        assert verify(tmp_path / "data") == manifest

    def test_layout_and_indentation_do_not_matter(self, tmp_path: Path) -> None:
        manifest = write_folder(tmp_path / "data", [random_tokens(10)])
        edit_sealed_manifest(lambda value: None)(tmp_path / "data")
        assert load_manifest(tmp_path / "data") == manifest

    def test_no_bit_of_a_manifest_can_change_unnoticed(self, tmp_path: Path) -> None:
        folder = tmp_path / "data"
        manifest = write_folder(folder, [random_tokens(20), random_tokens(30)])
        path = folder / "manifest.json"
        content = path.read_bytes()
        for at in range(0, len(content), 11):
            for bit in range(8):
                path.write_bytes(content[:at] + bytes([content[at] ^ (1 << bit)]) + content[at + 1 :])
                with pytest.raises(DataError) as caught:
                    load_manifest(folder)
                assert str(path) in str(caught.value) and "\n" not in str(caught.value), (at, bit)
        path.write_bytes(content)
        assert load_manifest(folder) == manifest


def write_manifest(content: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / "manifest.json").write_text(content)

    return damage


MANIFEST_DAMAGE: list[tuple[Callable[[Path], None], str]] = [
    (lambda folder: (folder / "manifest.json").unlink(), "has no manifest.json"),
    (write_manifest('{"format_version": 1'), "manifest.json is not valid JSON"),
    (write_manifest("[]"), r"must be an object, it is \[\]"),
    (edit_manifest(lambda m: m.update(format_version=2)), "format_version is 2, this program reads 1"),
    (edit_manifest(lambda m: m.update(format_version=True)), "format_version is True"),
    (edit_manifest(lambda m: m.pop("format_version")), "format_version is None"),
    (edit_manifest(lambda m: m.update(dtype="uint32")), "dtype is 'uint32', it must be 'uint16'"),
    (edit_manifest(lambda m: m.pop("tokenizer")), "missing key 'tokenizer'"),
    (edit_manifest(lambda m: m.update(extra=1)), "unknown key 'extra'; the keys are"),
    (edit_manifest(lambda m: m["tokenizer"].update(vocab_size="many")), "vocab_size must be an integer"),
    (edit_manifest(lambda m: m["source"].pop("kind")), "source: missing key 'kind'"),
    (edit_manifest(lambda m: m.update(shards={})), "shards must be a list"),
    (edit_manifest(lambda m: m.update(report=None)), "report must be an object, it is null"),
    (edit_manifest(lambda m: m.update(made=None)), "made must be an object, it is null"),
    (edit_manifest(lambda m: m["shards"][1].pop("tokens")), r"shards\[1\]: missing key 'tokens'"),
    (edit_manifest(lambda m: m["shards"][1].update(tokens=True)), r"shards\[1\]: tokens must be an integer"),
    (edit_manifest(lambda m: m["shards"][1].update(tokens=-1)), "tokens must be 0 or more"),
    (edit_manifest(lambda m: m["shards"][1].update(sha256="x")), "sha256 must be 64"),
    (edit_manifest(lambda m: m["shards"][1].update(file="../train_000001.npy")), "inside the folder"),
    (edit_manifest(lambda m: m["shards"][1].update(file="/etc/passwd")), "inside the folder"),
    (edit_manifest(lambda m: m["shards"][1].update(file="")), "inside the folder"),
    (edit_manifest(lambda m: m["shards"][1].update(file="train.txt")), r"ends in \.npy, \.arrow or \.bin"),
    (edit_manifest(lambda m: m["shards"][1].update(tokens=31)), "holds 30 tokens, manifest.json says 31"),
    (edit_manifest(lambda m: m.update(shards=[])), "has no split 'train'; it has none"),
    (edit_sealed_manifest(lambda m: m["shards"][1].update(tokens=29)), "contents changed"),
    (edit_sealed_manifest(lambda m: m["shards"].reverse()), "contents changed"),
    (edit_sealed_manifest(lambda m: m["settings"].update(seed=1)), "contents changed"),
    (edit_sealed_manifest(lambda m: m.update(sha256="0" * 64)), r"contents changed \(its own SHA-256 differs\)"),
    (edit_sealed_manifest(lambda m: m.update(sha256=7)), "contents changed"),
    (edit_sealed_manifest(lambda m: m["shards"][1].update(tokens=-1)), "tokens must be 0 or more"),
]


@pytest.mark.parametrize(("damage", "message"), MANIFEST_DAMAGE, ids=label)
def test_a_damaged_manifest_is_refused(tmp_path: Path, damage: Callable[[Path], None], message: str) -> None:
    folder = tmp_path / "data"
    write_folder(folder, [random_tokens(20), random_tokens(30)])
    damage(folder)
    require_refused(folder, message)
