"""Load a :class:`~pipeline.config.schema.Config` from JSON files and ``--set`` overrides, and validate it.

One ConfigError reports all mistakes in one line. For each mistake, the message names the dotted key, the file that sets
the key, and what is expected.
"""

import json
import re
import shlex
from collections.abc import Iterator, Sequence
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from data_tools.storage.content import describe_content
from data_tools.storage.files import dotted_keys
from pipeline.config.deepspeed_keys import find_mistakes, keys_of_deepspeed, sections_of_run
from pipeline.config.nearest import nearest_name
from pipeline.config.schema import BackendConfig, Config
from pipeline.config.shipped import find_config, is_shipped_config, shipped_configs
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
#: The names of keys in nanoGPT, transformers and DeepSpeed whose nearest match here is another key, or none.
_NAMES_ELSEWHERE = {
    "optimizer.learning_rate": ("lr", "max_lr"),
    "optimizer.weight_decay": ("wd",),
    "optimizer.eps": ("adam_epsilon", "epsilon"),
    "optimizer.grad_clip": ("max_grad_norm", "clip_grad"),
    "model.context_length": ("block_size", "n_positions", "n_ctx", "max_seq_len", "max_position_embeddings"),
    "model.n_embd": ("hidden_size", "d_model", "dim"),
    "model.n_head": ("num_attention_heads", "num_heads", "n_heads"),
    "batch.micro_batch_size": ("batch_size", "per_device_train_batch_size", "train_micro_batch_size_per_gpu"),
    "batch.tokens_per_step": ("train_batch_size", "gradient_accumulation_steps", "grad_accum_steps"),
    "schedule.name": ("lr_scheduler_type", "scheduler"),
    "schedule.max_steps": ("total_steps", "total_iters", "num_train_epochs", "epochs"),
    "run.precision": ("dtype", "bf16", "fp16", "mixed_precision"),
    "run.out_dir": ("output_dir",),
    "model.activation_checkpointing": ("gradient_checkpointing",),
    "evaluation.every_steps": ("eval_interval", "eval_steps"),
    "evaluation.max_batches": ("eval_iters",),
    "checkpoint.every_steps": ("save_steps", "save_interval"),
    "checkpoint.keep_last": ("save_total_limit",),
    "logging.every_steps": ("log_interval", "logging_steps"),
    "logging.sinks": ("report_to", "wandb_log"),
    "data.path": ("dataset", "data_dir", "train_data"),
}


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
    _refuse(mistakes)
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


def valid_keys(section: type[BaseModel] = Config, prefix: str = "") -> Iterator[str]:
    """Yield the dotted keys of a section and of its nested sections. Each key begins with ``prefix``.

    In a key, ``*`` represents any index of a list.
    """
    for name, field in section.model_fields.items():
        yield f"{prefix}{name}"
        for inner in _sections_in(field.annotation):
            index = "" if inner is field.annotation else "*."
            yield from valid_keys(inner, f"{prefix}{name}.{index}")


def _sections_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from _sections_in(argument)


def _resolve(layers: Sequence[tuple[dict[str, Any], str]]) -> tuple[Config, dict[str, str]]:
    """Merge and validate pairs of content and origin. Returns the config, and the origin of each dotted key."""
    merged: dict[str, Any] = {}
    origins: dict[str, str] = {}  # dotted key -> origin
    for content, origin in layers:
        _merge(merged, content, origins, origin)
    mistakes = list(_find_mistakes(merged, origins))
    _refuse(mistakes)
    return Config.model_validate(merged), origins


def _refuse(mistakes: list[str]) -> None:
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


def _find_mistakes(merged: dict[str, Any], origins: dict[str, str]) -> Iterator[str]:
    """Yield a line for each mistake. Unknown keys come first, because they can cause other mistakes."""
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
        raise ConfigError(f"{path}: expected a JSON object of sections, found {_shorten(content)}")
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


def _explain(mistake: ErrorDetails, origins: dict[str, str]) -> str:
    # pydantic appends "[key]" if the key of a mapping is wrong.
    *section, name = [str(key) for key in mistake["loc"] if key != "[key]"] or [""]
    path = ".".join([*section, name])
    where = _find_origin(path, origins)
    if mistake["type"] == "extra_forbidden":
        return f"{path or _shorten('')}: no such key ({where}){suggest_key('.'.join(section), name)}"
    message = _JSON_MESSAGES.get(mistake["type"], mistake["msg"].removeprefix("Value error, "))
    if mistake["type"] == "literal_error":
        message = message.replace("True", "true").replace("False", "false")
    found = "" if mistake["type"] == "value_error" else f", found {_shorten(mistake['input'])}"
    if mistake["type"] in ("list_type", "tuple_type") and mistake["input"] is not None:
        advice = _advise_list(mistake["input"], mistake["loc"], is_override=where == _SET_BY_OVERRIDE)
    elif mistake["type"] == "literal_error" and is_shipped_config(mistake["input"]):
        advice = f"; {mistake['input']} is a config: add it with --config {mistake['input']}"
    else:
        advice = _advise(mistake["input"], mistake["loc"])
    return f"{path}: {message}{found} ({where}){advice}" if path else f"{message} ({where})"


def _advise(given: Any, location: Sequence[int | str]) -> str:
    """Return advice if the value is null or a Python word such as True. For other values, return ""."""
    if isinstance(given, str) and given in _JSON_WORDS:
        return f"; JSON writes {_JSON_WORDS[given]}, not {given}"
    return _describe_field(_field_at(location)) if given is None else ""


def _describe_field(field: FieldInfo | None) -> str:
    return f"; {field.description.replace('`', '')}" if field and field.description else ""


def _advise_list(given: Any, location: Sequence[int | str], *, is_override: bool) -> str:
    """Return advice on how to write a list. If the value shows which items the list should have, write this list."""
    field = _field_at(location)
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


def _field_at(location: Sequence[int | str]) -> FieldInfo | None:
    section: type[BaseModel] | None = Config
    field = None
    for name in location:
        field = section.model_fields.get(str(name)) if section else None
        section = next(_sections_in(field.annotation), None) if field else None
    return field


def _shorten(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= _LONGEST_VALUE else f"{text[:_LONGEST_VALUE]}..."


def _find_origin(path: str, origins: dict[str, str]) -> str:
    while path and path not in origins:
        path = path.rpartition(".")[0]
    return f"set in {origins[path]}" if path else "from " + ", ".join(dict.fromkeys(origins.values()))


def _suggest_file(path: Path) -> str:
    if path.stem in shipped_configs():
        return f"; for the config that comes with the program, give its name: {path.stem}"
    candidates = {p.stem: str(p) for p in sorted(path.parent.glob("*.json"))} if path.parent.is_dir() else {}
    if str(path) == path.stem:  # a name without folder and suffix, as shipped configs have
        candidates = {name: name for name in shipped_configs()} | candidates
    if nearest := nearest_name(path.stem, candidates):
        return f"; did you mean {candidates[nearest]}?"
    return f"; there are: {', '.join(candidates.values())}" if candidates else ""


def suggest_key(section: str, name: str) -> str:
    """Return the end of an error message: the key that an unknown ``name`` in a section probably means.

    Args:
        section: the dotted name of the section, or "" for no section.
    """
    if "." in name:
        return '; in a file a section is an object, as in {"schedule": {"max_steps": 100}}'
    if key := find_key(section, name):
        return f"; did you mean {key}?"
    siblings = _keys_of(section)
    return f"{_HINT}{', '.join(siblings)}" if siblings else ""


def find_key(section: str, name: str) -> str | None:
    """Return the dotted key that an unknown ``name`` in a section probably means, or None.

    Args:
        section: the dotted name of the section, or "" for no section.
    """
    for key, names in _NAMES_ELSEWHERE.items():
        if name.lower() in names:
            return key
    siblings = _keys_of(section)
    others = {key.rpartition(".")[2]: key for key in valid_keys() if "*" not in key}
    for keys, cutoff in ((siblings, 0.5), (others, 0.8)):
        if nearest := nearest_name(name, keys, cutoff):
            return keys[nearest]
    return None


def _keys_of(section: str) -> dict[str, str]:
    """Return the names of the keys in a section, with their dotted keys."""
    generic = re.sub(r"\.\d+", ".*", section)  # a number stands for an element of a list
    names = [name for other, _, name in (key.rpartition(".") for key in valid_keys()) if other == generic]
    return {name: f"{section}.{name}" if section else name for name in names}
