"""Compute hashes of JSON objects, and list their values by dotted key."""

import hashlib
import json
from collections.abc import Iterator
from typing import Any


def sha256_of_json(value: dict[str, Any]) -> str:
    """Return the SHA-256 of a JSON object as 64 hexadecimal digits. The hash depends on the order of the keys."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def dotted_keys(content: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted key, value) for each value in nested JSON objects, such as ``("optimizer.eps", 1e-8)``.

    Each key begins with ``prefix``.
    """
    for key, value in content.items():
        if isinstance(value, dict):
            yield from dotted_keys(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
