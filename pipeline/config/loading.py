"""From JSON files and ``--set`` overrides to one validated :class:`~pipeline.config.schema.Config`.

Later files win over earlier ones, ``--set`` over all. Every mistake is a :class:`ConfigError`: the
dotted path, the file it came from, what was expected, and the nearest valid key.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from pipeline.config.deepspeed_keys import find_mistakes
from pipeline.config.schema import Config
from pipeline.errors import ConfigError

# What pydantic says in Python's words, in JSON's.
_JSON_WORDS = {
    "model_type": "Input should be an object with the keys of this section",
    "dict_type": "Input should be an object",
    "list_type": "Input should be a list",
    "tuple_type": "Input should be a list",
    "missing": "This item is missing",
}
_ITEM_INDEX = re.compile(r"\.\d+")
_LONGEST_VALUE = 80  # characters of a wrong value that a message shows


def load_config(files: Sequence[str | Path], overrides: Sequence[str] = ()) -> Config:
    """Read, merge and validate a run config.

    Args:
        files: JSON files, later ones over earlier ones.
        overrides: ``section.key=value``; the value is JSON, or else a string.

    Raises:
        ConfigError: one line with the path of the key, where it was set, and what is right.
    """
    merged: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for file in files:
        _merge(merged, _read_json_object(Path(file)), origins, str(file))
    for override in overrides:
        _merge(merged, _parse_override(override), origins, "--set")
    return _validated(merged, origins)


def config_from_json(content: dict[str, Any], origin: str) -> Config:
    """A config that was resolved before, as a checkpoint keeps it.

    Raises:
        ConfigError: as ``load_config``; ``origin`` names where it stands.
    """
    merged: dict[str, Any] = {}
    origins: dict[str, str] = {}
    _merge(merged, content, origins, origin)
    return _validated(merged, origins)


def _validated(merged: dict[str, Any], origins: dict[str, str]) -> Config:
    try:
        config = Config.model_validate(merged)
    except ValidationError as error:
        raise ConfigError(_explain(error, origins)) from None
    _refuse_unusable_deepspeed_json(config, origins)
    return config


def dump_config(config: Config) -> dict[str, Any]:
    """The resolved config as plain JSON values; ``load_config`` accepts them unchanged."""
    return config.model_dump(mode="json")


def _read_json_object(path: Path) -> dict[str, Any]:
    try:
        content = _decode(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such config file{_nearest_file(path)}") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read as a config file: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: byte {error.start} is not valid UTF-8; a config file is JSON in UTF-8") from None
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}:{error.lineno}:{error.colno}: not valid JSON: {error.msg}") from None
    except _UnusableJson as error:
        raise ConfigError(f"{path}: {error}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: expected a JSON object of sections, found {_shown(content)}")
    return content


class _UnusableJson(Exception):
    """JSON that no config can be. Its text says why."""


def _decode(text: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_refuse_duplicate_keys)
    except json.JSONDecodeError:
        raise
    except (RecursionError, ValueError) as error:  # brackets without end, a number of thousands of digits
        raise _UnusableJson(f"no config is nested so deep or holds such a number: {error}") from None


def _refuse_duplicate_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content: dict[str, Any] = {}
    for key, value in pairs:
        if key in content:
            raise _UnusableJson(f"the key {key!r} stands twice in one object; keep one")
        content[key] = value
    return content


def _nearest_file(path: Path) -> str:
    candidates = {p.stem: p for p in sorted(path.parent.glob("*.json"))} if path.parent.is_dir() else {}
    nearest = difflib.get_close_matches(path.stem, candidates, n=1)
    if nearest:
        return f"; did you mean {candidates[nearest[0]]}?"
    return f"; there are: {', '.join(map(str, candidates.values()))}" if candidates else ""


def _parse_override(override: str) -> dict[str, Any]:
    dotted, equals, text = override.partition("=")
    if not equals or not all(dotted.split(".")):
        raise ConfigError(f"--set {override}: expected section.key=value, as in --set schedule.max_steps=100")
    try:
        value = _decode(text)
    except json.JSONDecodeError:
        value = text
    except _UnusableJson as error:
        raise ConfigError(f"--set {dotted}: {error}") from None
    for key in reversed(dotted.split(".")):
        value = {key: value}
    assert isinstance(value, dict)
    return value


def _merge(into: dict[str, Any], new: dict[str, Any], origins: dict[str, str], origin: str, prefix: str = "") -> None:
    for key, value in new.items():
        path = f"{prefix}{key}"
        origins[path] = origin
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            _merge(into[key], value, origins, origin, f"{path}.")
        else:
            into[key] = value
            if isinstance(value, dict):
                into[key] = {}
                _merge(into[key], value, origins, origin, f"{path}.")
            elif isinstance(value, list):
                items = [(index, item) for index, item in enumerate(value) if isinstance(item, dict)]
                origins.update({f"{path}.{index}.{name}": origin for index, item in items for name in item})


def _explain(error: ValidationError, origins: dict[str, str]) -> str:
    """The first mistake of a validation as one line; unknown keys first, they often cause the rest."""
    mistakes = sorted(error.errors(), key=lambda mistake: mistake["type"] != "extra_forbidden")
    mistake = mistakes[0]
    location = [part for part in mistake["loc"] if isinstance(part, int) or str(part) in _known_names(origins)]
    path = ".".join(str(part) for part in location)
    where = _origin(path, origins)
    more = f" (and {len(mistakes) - 1} more)" if len(mistakes) > 1 else ""
    if mistake["type"] == "extra_forbidden":
        return f"{path or _shown('')}: no such key ({where}){_nearest_key(path, str(mistake['loc'][-1]))}{more}"
    message = _JSON_WORDS.get(mistake["type"], mistake["msg"].removeprefix("Value error, "))
    found = "" if mistake["type"] == "value_error" else f", found {_shown(mistake['input'])}"
    return f"{path}: {message}{found} ({where}){more}" if path else f"{message} ({where}){more}"


def _shown(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= _LONGEST_VALUE else f"{text[:_LONGEST_VALUE]}..."


def _known_names(origins: dict[str, str]) -> set[str]:
    """Keys that can stand in a path, as against the names pydantic gives to members of a union."""
    names = {part for key in (*valid_keys(), *_keys_of_items()) for part in key.split(".")}
    # Whole paths too: someone may have written one as a key.
    return {part for path in origins for part in path.split(".")} | names | set(valid_keys())


def _origin(path: str, origins: dict[str, str]) -> str:
    while path and path not in origins:
        path = path.rpartition(".")[0]
    return f"set in {origins[path]}" if path else "from " + ", ".join(dict.fromkeys(origins.values()))


def _nearest_key(path: str, last: str) -> str:
    if "." in last:
        return '; in a file a section is an object, as in {"schedule": {"max_steps": 100}}'
    section = path.rpartition(".")[0]
    siblings: dict[str, str] = {}  # name -> dotted key
    elsewhere: dict[str, str] = {}
    for key in valid_keys():
        key_section, _, name = key.rpartition(".")
        (siblings if key_section == section else elsewhere)[name] = key
    for key in _keys_of_items():
        key_section, _, name = key.rpartition(".")
        if key_section == _ITEM_INDEX.sub(".*", section):
            siblings[name] = f"{section}.{name}"
    for keys, cutoff in ((siblings, 0.5), (elsewhere, 0.8)):
        if nearest := difflib.get_close_matches(last, keys, n=1, cutoff=cutoff):
            return f"; did you mean {keys[nearest[0]]}?"
    return f"; valid keys here: {', '.join(siblings)}" if siblings else ""


def valid_keys(section: type[BaseModel] = Config, prefix: str = "") -> Iterator[str]:
    """Every dotted key of the schema, sections included."""
    for name, field in section.model_fields.items():
        yield f"{prefix}{name}"
        annotation = field.annotation
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            yield from valid_keys(annotation, f"{prefix}{name}.")


def _keys_of_items(section: type[BaseModel] = Config, prefix: str = "") -> Iterator[str]:
    """The keys of objects in lists, dotted, with a star for the index."""
    for name, field in section.model_fields.items():
        for inner in _sections_in(field.annotation):
            if inner is field.annotation:
                yield from _keys_of_items(inner, f"{prefix}{name}.")
            else:
                yield from (f"{prefix}{name}.*.{key}" for key in inner.model_fields)


def _sections_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from _sections_in(argument)


def _refuse_unusable_deepspeed_json(config: Config, origins: dict[str, str]) -> None:
    native, where = config.backend.deepspeed, _origin("backend.deepspeed", origins)
    for key, mistake in find_mistakes(native):
        path = f"backend.deepspeed.{key}"
        raise ConfigError(f"{path}: {mistake} ({_origin(path, origins)})")
    if native and config.backend.name != "deepspeed":
        raise ConfigError(
            f"backend.deepspeed is set but backend.name is {config.backend.name}; "
            f'set backend.name to "deepspeed" or drop backend.deepspeed ({where})'
        )
    try:
        json.dumps(native, allow_nan=False)
    except ValueError:
        raise ConfigError(f"backend.deepspeed: every number must be finite, found NaN or Infinity ({where})") from None
