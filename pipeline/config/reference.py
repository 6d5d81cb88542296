"""Describe all config keys for the command ``config keys`` and for the page ``docs/config.md``.

``python -m pipeline.config.reference > docs/config.md`` writes the page.
"""

import json
import textwrap
from collections.abc import Iterator
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel

from pipeline.config.keys import find_key
from pipeline.config.loading import dump_config
from pipeline.config.schema import MODEL_PRESETS, Config
from pipeline.errors import ConfigError

LINE_COLUMNS = 120
TERMINAL_COLUMNS = 100

_INTRODUCTION = """# Config keys

A run config is a JSON object of sections. Every key is optional. The defaults are the recipe for GPT-2 124M.
In a path, a leading `~` means your home folder.

Do not edit this page. Change the schema in `pipeline/config/schema.py`, then run
`python -m pipeline.config.reference > docs/config.md`.
"""


def config_reference() -> str:
    """Return the page ``docs/config.md`` as Markdown."""
    lines = [_INTRODUCTION]
    for name, meaning, keys in _sections():
        lines += [f"## {name}\n", f"{_fill(meaning, LINE_COLUMNS)}\n", "| key | default | meaning |", "|---|---|---|"]
        lines += [*(f"| `{key}` | `{default}` | {meaning} |" for key, default, meaning in keys), ""]
    lines += [
        "## Presets of `model.preset`\n",
        "| preset | layers | heads | width | positions |",
        "|---|---|---|---|---|",
    ]
    lines += [f"| `{preset}` | {' | '.join(map(str, sizes.values()))} |" for preset, sizes in MODEL_PRESETS.items()]
    return "\n".join(lines) + "\n"


def format_keys(wanted: str = "") -> str:
    """Return a text for a terminal with the defaults and meanings of config keys.

    Args:
        wanted: a section or a key, such as ``run`` or ``run.compile``. Empty for all keys.

    Raises:
        ConfigError: there is no such section or key.
    """
    described = [row for _, _, keys in _sections() for row in keys]
    shown = [row for row in described if not wanted or f"{row[0]}.".startswith(f"{wanted}.")]
    if not shown:
        section, _, name = wanted.rpartition(".")
        key = find_key(section, name)
        advice = f"; did you mean {key}?" if key else f"; the sections are {', '.join(Config.model_fields)}"
        raise ConfigError(f"{wanted}: no such section or key{advice}")
    return "\n".join(
        f"{key} = {default}\n{_fill(meaning.replace('`', ''), TERMINAL_COLUMNS, indent=4)}"
        for key, default, meaning in shown
    )


def _sections() -> Iterator[tuple[str, str, list[tuple[str, str, str]]]]:
    """Yield (name, meaning, keys) of each section. Each key is (name, default as JSON, meaning)."""
    defaults = dump_config(Config())
    for name, field in Config.model_fields.items():
        assert isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
        meaning = " ".join((field.annotation.__doc__ or "").split()).replace("``", "`")
        yield name, meaning, list(_keys(f"{name}.", field.annotation, defaults[name]))


def _keys(prefix: str, section: type[BaseModel], defaults: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    for key, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _keys(f"{prefix}{key}.", field.annotation, defaults[key])
        else:
            meaning = " ".join(filter(None, (field.description, _choices(field.annotation))))
            yield f"{prefix}{key}", json.dumps(defaults[key]), meaning


def _fill(text: str, columns: int, indent: int = 0) -> str:
    """Wrap a text to lines of at most ``columns`` characters. Each line begins with ``indent`` spaces."""
    space = " " * indent
    return textwrap.fill(
        text, columns, initial_indent=space, subsequent_indent=space, break_long_words=False, break_on_hyphens=False
    )


def _choices(annotation: Any) -> str:
    """Return the choices of a ``Literal`` as text. It may be inside a list or a union. If there is none, return ""."""
    if get_origin(annotation) is Literal:
        return f"One of {', '.join(f'`{json.dumps(choice)}`' for choice in get_args(annotation))}."
    return next(filter(None, map(_choices, get_args(annotation))), "")


if __name__ == "__main__":
    print(config_reference(), end="")
