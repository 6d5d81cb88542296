"""Generate ``docs/config.md`` from the schema: ``python -m pipeline.config.reference > docs/config.md``."""

import json
import textwrap
from collections.abc import Iterator
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel

from pipeline.config.loading import dump_config
from pipeline.config.schema import MODEL_PRESETS, Config

LINE_COLUMNS = 120

_INTRODUCTION = """# Config keys

A run config is a JSON object of sections. Every key is optional: the defaults below are the GPT-2 124M recipe.
Do not edit this page. Change the schema in `pipeline/config/schema.py`, then run
`python -m pipeline.config.reference > docs/config.md`.
"""


def config_reference() -> str:
    """Return a Markdown page with all config keys, their defaults and their meanings."""
    defaults = dump_config(Config())
    lines = [_INTRODUCTION]
    for name, field in Config.model_fields.items():
        assert isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
        meaning = " ".join((field.annotation.__doc__ or "").split()).replace("``", "`")
        meaning = textwrap.fill(meaning, LINE_COLUMNS, break_long_words=False, break_on_hyphens=False)
        lines += [f"## {name}\n", f"{meaning}\n", "| key | default | meaning |", "|---|---|---|"]
        lines += [*_rows(f"{name}.", field.annotation, defaults[name]), ""]
    lines += [
        "## Presets of `model.preset`\n",
        "| preset | layers | heads | width | positions |",
        "|---|---|---|---|---|",
    ]
    lines += [f"| `{preset}` | {' | '.join(map(str, sizes.values()))} |" for preset, sizes in MODEL_PRESETS.items()]
    return "\n".join(lines) + "\n"


def _rows(prefix: str, section: type[BaseModel], defaults: dict[str, Any]) -> Iterator[str]:
    for key, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _rows(f"{prefix}{key}.", field.annotation, defaults[key])
        else:
            meaning = " ".join(filter(None, (field.description, _choices(field.annotation))))
            yield f"| `{prefix}{key}` | `{json.dumps(defaults[key])}` | {meaning} |"


def _choices(annotation: Any) -> str:
    """Return the choices of a literal as text, also if it is inside a list or a union. Returns "" without a literal."""
    if get_origin(annotation) is Literal:
        return f"One of {', '.join(f'`{json.dumps(choice)}`' for choice in get_args(annotation))}."
    return next(filter(None, map(_choices, get_args(annotation))), "")


if __name__ == "__main__":
    print(config_reference(), end="")
