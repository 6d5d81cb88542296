"""Find the mistakes in a run config, and describe each one for the error message.

The message names the dotted key, the file that sets the key, and what is expected. One ConfigError has all mistakes.
"""

import json
import shlex
from collections.abc import Iterator, Sequence
from copy import deepcopy
from typing import Any

from pydantic import BaseModel, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from pipeline.config.deepspeed_keys import find_mistakes
from pipeline.config.keys import field_at, find_key, keys_in
from pipeline.config.schema import BackendConfig, Config
from pipeline.config.shipped import is_shipped_config
from pipeline.errors import ConfigError

# pydantic's messages name types of Python. These replacements name types of JSON.
_JSON_MESSAGES = {
    "model_type": "Input should be an object with the keys of this section",
    "dict_type": "Input should be an object",
    "list_type": "Input should be a list",
    "tuple_type": "Input should be a list",
    "missing": "This item is missing",
}
_JSON_WORDS = {"True": "true", "False": "false", "None": "null"}
_MOST_MISTAKES = 20  # per message
_HINT = "; valid keys here: "
_SET_BY_OVERRIDE = "set in --set"
_LONGEST_VALUE = 80  # characters of a wrong value in a message


def refuse(mistakes: list[str]) -> None:
    """If there are mistakes, raise ConfigError with all mistakes in one line. Each hint appears only once."""
    if len(mistakes) == 1:
        raise ConfigError(mistakes[0])
    if mistakes:
        hints: set[str] = set()
        listed = []
        for number, mistake in enumerate(mistakes[:_MOST_MISTAKES], start=1):
            text, _, hint = mistake.partition(_HINT)
            listed.append(f"({number}) {text if hint in hints else mistake}")
            hints.add(hint)
        if len(mistakes) > _MOST_MISTAKES:
            listed.append(f"and {len(mistakes) - _MOST_MISTAKES} more, so this may not be a run config")
        raise ConfigError(f"{len(mistakes)} mistakes: {'; '.join(listed)}")


def describe_mistakes(merged: dict[str, Any], origins: dict[str, str]) -> Iterator[str]:
    """Yield a text for each mistake. Unknown keys come first, because they can cause other mistakes.

    Args:
        merged: the content of all config files and overrides.
        origins: maps the dotted keys of ``merged`` to the file that sets the key, or to ``--set``.
    """
    unknown = [mistake for mistake in _errors_of(Config, merged) if mistake["type"] == "extra_forbidden"]
    known = deepcopy(merged)
    for mistake in unknown:
        _remove(known, mistake["loc"])
    for mistake in (*unknown, *_errors_of(Config, known)):
        yield _explain(mistake, origins)
    backend = known.get("backend", {})
    if not _errors_of(BackendConfig, backend):
        for key, text in find_mistakes(BackendConfig.model_validate(backend)):
            yield f"{key}: {text} ({_find_origin(key, origins)})"


def _errors_of(section: type[BaseModel], content: Any) -> list[ErrorDetails]:
    try:
        section.model_validate(content)
    except ValidationError as error:
        return error.errors()
    return []


def _remove(content: Any, location: tuple[int | str, ...]) -> None:
    """Remove an unknown key. pydantic checks combinations of keys only if there are no unknown keys."""
    *sections, name = location
    for section in sections:
        content = content[section]
    del content[name]


def _explain(mistake: ErrorDetails, origins: dict[str, str]) -> str:
    # pydantic appends "[key]" if the key of a mapping is wrong.
    *section, name = [str(key) for key in mistake["loc"] if key != "[key]"] or [""]
    path = ".".join([*section, name])
    where = _find_origin(path, origins)
    if mistake["type"] == "extra_forbidden":
        return f"{path or shorten('')}: no such key ({where}){_suggest_key('.'.join(section), name)}"
    message = _JSON_MESSAGES.get(mistake["type"], mistake["msg"].removeprefix("Value error, "))
    if mistake["type"] == "literal_error":
        message = message.replace("True", "true").replace("False", "false")
    found = "" if mistake["type"] == "value_error" else f", found {shorten(mistake['input'])}"
    advice = _advise(mistake, is_override=where == _SET_BY_OVERRIDE)
    return f"{path}: {message}{found} ({where}){advice}" if path else f"{message} ({where})"


def _suggest_key(section: str, name: str) -> str:
    """Return the end of an error message: the key that an unknown ``name`` in a section probably means.

    Args:
        section: the dotted name of the section, or "" for no section.
    """
    if "." in name:
        return '; in a file a section is an object, as in {"schedule": {"max_steps": 100}}'
    if key := find_key(section, name):
        return f"; did you mean {key}?"
    siblings = keys_in(section)
    return f"{_HINT}{', '.join(siblings)}" if siblings else ""


def _advise(mistake: ErrorDetails, *, is_override: bool) -> str:
    """Return advice for the end of the message, or "" if the message already says enough."""
    given = mistake["input"]
    if given is None:
        return _describe_field(field_at(mistake["loc"]))
    if mistake["type"] in ("list_type", "tuple_type"):
        return _advise_list(given, mistake["loc"], is_override=is_override)
    if mistake["type"] == "literal_error" and is_shipped_config(given):
        return f"; {given} is a config: add it with --config {given}"
    if isinstance(given, str) and given in _JSON_WORDS:
        return f"; JSON writes {_JSON_WORDS[given]}, not {given}"
    return ""


def _advise_list(given: Any, location: Sequence[int | str], *, is_override: bool) -> str:
    """Return advice on how to write a list. If the value shows which items the list should have, write this list."""
    field = field_at(location)
    if field is None or field.annotation is None:
        return ""
    items = [_read_item(item) for item in given.strip("[](){} '\"").split(",")] if isinstance(given, str) else [given]
    try:
        TypeAdapter[Any](field.annotation).validate_json(json.dumps(items), strict=True)
    except ValidationError:
        return _describe_field(field)
    if not is_override:
        return f"; write {json.dumps(items)}"
    override = f"{'.'.join(map(str, location))}={json.dumps(items)}"
    return f"; a list is JSON, as in --set {shlex.quote(override)}"


def _read_item(text: str) -> Any:
    text = text.strip(" '\"")
    try:
        return json.loads(text)
    except ValueError:
        return text


def _describe_field(field: FieldInfo | None) -> str:
    return f"; {field.description.replace('`', '')}" if field and field.description else ""


def _find_origin(path: str, origins: dict[str, str]) -> str:
    while path and path not in origins:
        path = path.rpartition(".")[0]
    return f"set in {origins[path]}" if path else "from " + ", ".join(dict.fromkeys(origins.values()))


def shorten(value: Any) -> str:
    """Return a value as JSON for a message. A long text is cut."""
    text = json.dumps(value, default=str)
    return text if len(text) <= _LONGEST_VALUE else f"{text[:_LONGEST_VALUE]}..."
