"""From JSON files and ``--set`` overrides to one validated :class:`~pipeline.config.Config`.

Later files win over earlier ones, ``--set`` over all. Every mistake is a :class:`ConfigError`: the
dotted path, the file it came from, what was expected, and the nearest valid key.
"""

from __future__ import annotations

import difflib
import json
import types
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from pipeline.config import Config
from pipeline.errors import ConfigError

# backend.deepspeed is DeepSpeed's own JSON. These keys of it are the run config's business.
DEEPSPEED_KEYS_OWNED_BY_RUN = {
    "train_batch_size": "batch.tokens_per_step",
    "train_micro_batch_size_per_gpu": "batch.micro_batch_size",
    "gradient_accumulation_steps": "batch.tokens_per_step",
    "managed_gradient_accumulation": "batch.tokens_per_step",
    "gradient_clipping": "optimizer.grad_clip",
    "optimizer": "optimizer.*",
    "scheduler": "schedule.*",
    "fp16": "run.precision",
    "bf16": "run.precision",
    "torch_autocast": "run.precision",
    "data_types": "run.precision",
    "communication_data_type": "run.precision",
    "zero_force_ds_cpu_optimizer": "backend.deepspeed.zero_optimization.offload_optimizer",
    "tensorboard": "logging.tensorboard",
}


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
    _refuse_owned_deepspeed_keys(config, origins)
    return config


def dump_config(config: Config) -> dict[str, Any]:
    """The resolved config as plain JSON values; ``load_config`` accepts them unchanged."""
    return config.model_dump(mode="json")


def _read_json_object(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_refuse_duplicate_keys)
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such config file{_nearest_file(path)}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as a config file: {error}") from None
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}:{error.lineno}:{error.colno}: not valid JSON: {error.msg}") from None
    except _DuplicateKey as error:
        raise ConfigError(f"{path}: the key {error} stands twice in one object; keep one") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: expected a JSON object of sections, found a {type(content).__name__}")
    return content


class _DuplicateKey(Exception):
    pass


def _refuse_duplicate_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content: dict[str, Any] = {}
    for key, value in pairs:
        if key in content:
            raise _DuplicateKey(repr(key))
        content[key] = value
    return content


def _nearest_file(path: Path) -> str:
    candidates = [p.name for p in path.parent.glob("*.json")] if path.parent.is_dir() else []
    nearest = difflib.get_close_matches(path.name, candidates, n=1)
    return f"; did you mean {path.parent / nearest[0]}?" if nearest else ""


def _parse_override(override: str) -> dict[str, Any]:
    dotted, equals, text = override.partition("=")
    if not equals or not all(dotted.split(".")):
        raise ConfigError(f"--set {override}: expected section.key=value, as in --set schedule.max_steps=100")
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        value = text
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


def _explain(error: ValidationError, origins: dict[str, str]) -> str:
    """The first mistake of a validation as one line; unknown keys first, they often cause the rest."""
    mistakes = sorted(error.errors(), key=lambda mistake: mistake["type"] != "extra_forbidden")
    mistake = mistakes[0]
    location = [part for part in mistake["loc"] if isinstance(part, int) or str(part) in _known_names(origins)]
    path = ".".join(str(part) for part in location)
    where = _origin(path, origins)
    more = f" (and {len(mistakes) - 1} more)" if len(mistakes) > 1 else ""
    if mistake["type"] == "extra_forbidden":
        return f"{path}: no such key ({where}){_nearest_key(path)}{more}"
    message = mistake["msg"].removeprefix("Value error, ")
    found = "" if mistake["type"] == "value_error" else f", found {json.dumps(mistake['input'], default=str)}"
    return f"{path}: {message}{found} ({where}){more}" if path else f"{message} ({where}){more}"


def _known_names(origins: dict[str, str]) -> set[str]:
    """Keys that can stand in a path, as against the names pydantic gives to members of a union."""
    return {part for path in origins for part in path.split(".")} | {path for path, _ in valid_keys()}


def _origin(path: str, origins: dict[str, str]) -> str:
    while path and path not in origins:
        path = path.rpartition(".")[0]
    return f"set in {origins[path]}" if path else "from " + ", ".join(dict.fromkeys(origins.values()))


def _nearest_key(path: str) -> str:
    known = [key for key, _ in valid_keys()]
    last = path.rpartition(".")[2]
    same_name_elsewhere = [key for key in known if key.rpartition(".")[2] == last]
    siblings = [key for key in known if key.rpartition(".")[0] == path.rpartition(".")[0]]
    nearest = (
        difflib.get_close_matches(path, siblings, n=1, cutoff=0.7)
        or same_name_elsewhere
        or difflib.get_close_matches(path, known, n=1, cutoff=0.5)
    )
    if nearest:
        return f"; did you mean {nearest[0]}?"
    return f"; valid keys here: {', '.join(key.rpartition('.')[2] for key in siblings)}" if siblings else ""


def valid_keys(section: type[BaseModel] = Config, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Every dotted key of the schema with its description, sections included."""
    for name, field in section.model_fields.items():
        yield f"{prefix}{name}", field.description or ""
        annotation = field.annotation
        if typing.get_origin(annotation) in (typing.Union, types.UnionType):
            continue
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            yield from valid_keys(annotation, f"{prefix}{name}.")


def _refuse_owned_deepspeed_keys(config: Config, origins: dict[str, str]) -> None:
    for key in config.backend.deepspeed:
        if key in DEEPSPEED_KEYS_OWNED_BY_RUN:
            path = f"backend.deepspeed.{key}"
            owner = DEEPSPEED_KEYS_OWNED_BY_RUN[key]
            raise ConfigError(f"{path}: the run config owns this; set {owner} instead ({_origin(path, origins)})")
    if config.backend.deepspeed and config.backend.name != "deepspeed":
        where = _origin("backend.deepspeed", origins)
        raise ConfigError(
            f"backend.deepspeed is set but backend.name is {config.backend.name}; "
            f'set backend.name to "deepspeed" or drop backend.deepspeed ({where})'
        )
