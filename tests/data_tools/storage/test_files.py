"""Hashes of files and JSON objects."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from data_tools.storage import files as storage


def test_sha256_of_a_file_longer_than_one_read(tmp_path: Path) -> None:
    content = bytes(range(256)) * 40_000
    assert len(content) > storage._HASH_CHUNK_BYTES
    (tmp_path / "file").write_bytes(content)
    assert storage.sha256_of_file(tmp_path / "file") == hashlib.sha256(content).hexdigest()


def test_sha256_of_an_empty_file(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert storage.sha256_of_file(tmp_path / "file") == hashlib.sha256(b"").hexdigest()


def test_sha256_of_json_is_that_of_its_values_in_their_order() -> None:
    value = {"b": [1, 2.5, None, "é"], "a": {"x": True}}
    sha256 = storage.sha256_of_json(value)
    assert sha256 == storage.sha256_of_json(json.loads(json.dumps(value, indent=2)))
    assert sha256 != storage.sha256_of_json(dict(reversed(value.items())))
    assert sha256 != storage.sha256_of_json({**value, "b": [1, 2.5, None, "e"]})
