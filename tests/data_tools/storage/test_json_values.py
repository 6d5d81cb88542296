"""Hashes of JSON objects, and their values by dotted key."""

from __future__ import annotations

import json

from data_tools.storage.json_values import dotted_keys, sha256_of_json


def test_sha256_of_json_is_that_of_its_values_in_their_order() -> None:
    value = {"b": [1, 2.5, None, "é"], "a": {"x": True}}
    sha256 = sha256_of_json(value)
    assert sha256 == sha256_of_json(json.loads(json.dumps(value, indent=2)))
    assert sha256 != sha256_of_json(dict(reversed(value.items())))
    assert sha256 != sha256_of_json({**value, "b": [1, 2.5, None, "e"]})


def test_dotted_keys_are_those_of_the_innermost_values() -> None:
    content = {"optimizer": {"eps": 1e-8, "muon": {"nesterov": True}}, "betas": [0.9]}
    assert dict(dotted_keys(content)) == {"optimizer.eps": 1e-8, "optimizer.muon.nesterov": True, "betas": [0.9]}
