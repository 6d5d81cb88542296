"""Load a :class:`~pipeline.config.schema.Config` from JSON files and ``--set`` overrides, and validate it."""

import json
import shlex
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from data_tools.storage.content import describe_content
from data_tools.storage.json_values import dotted_keys
from pipeline.config.deepspeed_keys import keys_of_deepspeed, sections_of_run
from pipeline.config.mistakes import describe_mistakes, refuse, shorten
from pipeline.config.nearest import nearest_name
from pipeline.config.schema import Config
from pipeline.config.shipped import find_config, is_shipped_config, shipped_configs
from pipeline.errors import ConfigError


def load_config(
    files: str | Path | Sequence[str | Path], overrides: str | Sequence[str] = (), deepspeed: str | Path | None = None
) -> Config:
    """Merge config files and overrides into one run config, and validate it.

    Args:
        files: one or several JSON files, or names of shipped configs such as ``zero1``. Later files override earlier
            files, key by key. ``{}`` empties a key such as ``backend.deepspeed``.
        overrides: one or several texts of the form ``section.key=value``. A value that is not valid JSON is used as a
            string.
        deepspeed: a file with DeepSpeed's own JSON config, which overrides ``backend.deepspeed`` in ``files``.

    Raises:
        ConfigError: a file or an override cannot be read, or the merged config is not valid.
    """
    files = [files] if isinstance(files, str | Path) else files
    overrides = [overrides] if isinstance(overrides, str) else overrides
    config, _ = load_config_with_origins(files, overrides, deepspeed)
    return config


def load_config_with_origins(
    files: Sequence[str | Path], overrides: Sequence[str] = (), deepspeed: str | Path | None = None
) -> tuple[Config, dict[str, str]]:
    """Load a config as ``load_config`` does, and also return where each key was set.

    The second result maps each dotted key to the file that set it, or to ``--set``. Keys that were not set are
    missing.
    """
    paths = [find_config(file) for file in files]
    sources = [(partial(_read_run_config, path), str(path)) for path in paths]
    if deepspeed is not None:
        sources.append((partial(_read_native, deepspeed), str(deepspeed)))
    sources += [(partial(_parse_override, override), "--set") for override in overrides]
    layers: list[tuple[dict[str, Any], str]] = []
    mistakes: list[str] = []
    for read, origin in sources:
        try:
            layers.append((read(), origin))
        except ConfigError as error:
            mistakes.append(str(error))
    refuse(mistakes)
    return _resolve(layers)


def keys_of_overrides(overrides: Sequence[str]) -> list[str]:
    """Return the dotted keys in overrides of the form ``section.key=value``. Raises ConfigError for any other form."""
    return [key for override in overrides for key, _ in dotted_keys(_parse_override(override))]


def config_from_json(content: dict[str, Any], origin: str) -> Config:
    """Build a config from JSON values, for example from a checkpoint.

    Raises ConfigError if the config is not valid. The message names the file ``origin``.
    """
    config, _ = _resolve([(content, origin)])
    return config


def dump_config(config: Config) -> dict[str, Any]:
    """Return a config as JSON values, with all defaults. ``load_config`` accepts a file with these values."""
    return config.model_dump(mode="json")


def _resolve(layers: Sequence[tuple[dict[str, Any], str]]) -> tuple[Config, dict[str, str]]:
    """Merge and validate pairs of content and origin. Returns the config, and the origin of each dotted key."""
    merged: dict[str, Any] = {}
    origins: dict[str, str] = {}  # dotted key -> origin
    for content, origin in layers:
        _merge(merged, content, origins, origin)
    refuse(list(describe_mistakes(merged, origins)))
    return Config.model_validate(merged), origins


def _merge(merged: dict[str, Any], content: dict[str, Any], origins: dict[str, str], origin: str, at: str = "") -> None:
    """Merge a layer into the layers before it. An empty object empties a key, but it leaves a section as it is."""
    for key, value in content.items():
        origins[f"{at}{key}"] = origin
        if isinstance(value, dict) and (value or not at):
            if not isinstance(merged.get(key), dict):
                merged[key] = {}
            _merge(merged[key], value, origins, origin, f"{at}{key}.")
        else:
            merged[key] = value


def _read_run_config(path: Path) -> dict[str, Any]:
    content = _read_json_object(path)
    if native := keys_of_deepspeed(content):
        raise ConfigError(
            f"{path}: this is DeepSpeed's own JSON ({', '.join(native[:3])}), not a run config; "
            f"give it with --deepspeed {shlex.quote(str(path))}, and a run config with --config"
        )
    return content


def _read_native(name: str | Path) -> dict[str, Any]:
    path = Path(name)
    is_shipped = is_shipped_config(name)
    content = {} if is_shipped else _read_json_object(path)
    sections = sections_of_run(content)
    if is_shipped or sections:
        listed = f" ({', '.join(sections[:3])})" if sections else ""
        raise ConfigError(
            f"--deepspeed {name}: this is a run config{listed}, not DeepSpeed's own JSON; give it with --config "
            f"{shlex.quote(str(name))}, together with the other run configs"
        )
    return {"backend": {"name": "deepspeed", "deepspeed": content}}


def _read_json_object(path: Path) -> dict[str, Any]:
    try:
        content = _decode(path.read_text(encoding="utf-8-sig"), str(path))  # editors on Windows add a mark
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such config file{_suggest_file(path)}") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read as a config file: {error.strerror}") from None
    except UnicodeDecodeError as error:
        reason = describe_content(path) or f"byte {error.start} is not valid UTF-8; a config file is JSON in UTF-8"
        raise ConfigError(f"{path}: {reason}") from None
    except json.JSONDecodeError as error:
        if found := describe_content(path):
            raise ConfigError(f"{path}: {found}") from None
        raise ConfigError(f"{path}:{error.lineno}:{error.colno}: not valid JSON: {error.msg}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: expected a JSON object of sections, found {shorten(content)}")
    return content


def _parse_override(override: str) -> dict[str, Any]:
    dotted, equals, text = override.partition("=")
    if not equals or not all(dotted.split(".")):
        raise ConfigError(f"--set {override}: expected section.key=value, as in --set schedule.max_steps=100")
    try:
        value = _decode(text, f"--set {dotted}")
    except json.JSONDecodeError:
        value = text
    *sections, name = dotted.split(".")
    content = {name: value}
    for section in reversed(sections):
        content = {section: content}
    return content


def _decode(text: str, origin: str) -> Any:
    def refuse_duplicate_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        content: dict[str, Any] = {}
        for key, value in pairs:
            if key in content:
                raise ConfigError(f"{origin}: the key {key!r} is given twice in one object; keep one")
            content[key] = value
        return content

    try:
        return json.loads(text, object_pairs_hook=refuse_duplicate_keys)
    except json.JSONDecodeError:
        raise
    except (RecursionError, ValueError) as error:
        reason = "the JSON is nested too deep or holds a number that is too long"
        raise ConfigError(f"{origin}: {reason}: {error}") from None


def _suggest_file(path: Path) -> str:
    if path.stem in shipped_configs():
        return f"; for the config that comes with the program, give its name: {path.stem}"
    candidates = {p.stem: str(p) for p in sorted(path.parent.glob("*.json"))} if path.parent.is_dir() else {}
    if str(path) == path.stem:  # a name without folder and suffix, as shipped configs have
        candidates = {name: name for name in shipped_configs()} | candidates
    if nearest := nearest_name(path.stem, candidates):
        return f"; did you mean {candidates[nearest]}?"
    return f"; there are: {', '.join(candidates.values())}" if candidates else ""
