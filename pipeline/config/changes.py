"""Compare two resolved configs, such as those of a checkpoint and of this command."""

import json
from typing import Any

from data_tools.storage.json_values import dotted_keys

_UNSET = object()


def changed_settings(before: dict[str, Any], now: dict[str, Any]) -> dict[str, str]:
    """Return the differences of two resolved configs: dotted key -> text such as ``0.001 -> 0.0001``, sorted.

    Keys that are in only one config are ignored, because different versions of this project may have written the
    configs. Keys of ``backend.deepspeed`` are never ignored.
    """
    old, new = dict(dotted_keys(before)), dict(dotted_keys(now))
    changes = {}
    for key in sorted({*old, *new}):
        values = old.get(key, _UNSET), new.get(key, _UNSET)
        if values[0] != values[1] and (_UNSET not in values or key.startswith("backend.deepspeed.")):
            changes[key] = " -> ".join(map(_as_text, values))
    return changes


def _as_text(value: Any) -> str:
    if value is _UNSET:
        return "unset"
    return value if isinstance(value, str) else json.dumps(value)
