"""Import a GPT-2 into a new run, from a Hugging Face folder or from the hub.

The weights are in ``model.safetensors`` or ``pytorch_model.bin``, or in several such files with an index file.
"""

import logging
import re
import shlex
import textwrap
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from data_tools.errors import PROJECT
from data_tools.shards.manifest import other_tokenizer
from pipeline.checkpoint.conversion import require_new_run_folder, write_new_run
from pipeline.checkpoint.json_files import read_json_object
from pipeline.checkpoint.layout import is_checkpoint, list_checkpoints
from pipeline.checkpoint.pieces import open_tensors
from pipeline.checkpoint.state import TrainingState
from pipeline.config.loading import config_from_json
from pipeline.config.schema import Config, ModelConfig, RunConfig
from pipeline.errors import CheckpointError
from pipeline.interop.differences import describe_differences, describe_dtypes, rows_of_the_tokenizer
from pipeline.interop.foreign import (
    Conversion,
    ForeignModel,
    load_pickled_tensors,
    model_shapes,
    read_named_weights,
    read_padded,
    require_shapes,
    require_sizes,
)
from pipeline.interop.hugging_face.layout import (
    CONFIG_FILE,
    SIZE_KEYS,
    WEIGHTS_FILE,
    from_config_json,
    is_transposed,
    stored_shapes,
)
from pipeline.interop.hugging_face.tokenizer_files import VOCABULARY_FILE, describe_other_tokenizer
from pipeline.model.parameter_state import TOKEN_EMBEDDING, WEIGHT

log = logging.getLogger(__name__)

_PICKLED_FILE = "pytorch_model.bin"
_WEIGHT_FILES = (WEIGHTS_FILE, _PICKLED_FILE)
_INDEX_ENDING = ".index.json"

# The files to download. The second list is used if the hub does not have the files of the first list.
_WEIGHT_PATTERNS = (["model*.safetensors", "model.safetensors.index.json"], ["pytorch_model*.bin*"])
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


def import_folder(source: str, run_folder: Path) -> Conversion:
    """Write a Hugging Face model into a new run folder, as a checkpoint of step 0 and a ``config.json``.

    The optimizer state is zero. ``source`` is a folder, or the name of a model on the hub.

    Raises:
        CheckpointError: the model is missing, damaged or not a GPT-2, or the run folder cannot be used.
        ConfigError: the model's config is not valid for a run, or another process is using the run folder.
    """
    require_new_run_folder(run_folder)
    folder = find_folder(source)
    if list_checkpoints(folder) or is_checkpoint(folder):
        raise CheckpointError(
            f"--from-hf {source}: this is a run or a checkpoint of {PROJECT}, not a Hugging Face model; start a new "
            f"run from its weights with {PROJECT} train --init-from {shlex.quote(source)}"
        )
    model = read_folder(folder)
    notes = [
        f"step 0: {folder} does not say how it was trained; its moments and its schedule start from zero",
        *model.notes,
    ]
    config = Config(run=RunConfig(name=_name_of(source), out_dir=str(run_folder)), model=model.config)
    state = TrainingState(
        step=0,
        samples=0,
        tokens=0,
        updates=0,
        loss_scale=None,
        loss_scale_good_steps=0,
        seed=config.run.seed,
        tokenizer=model.tokenizer,
    )
    read = partial(read_padded, {WEIGHT: model.weights}, shapes := model_shapes(config.model))
    return Conversion(write_new_run(run_folder, config, state, shapes, read), notes)


def _name_of(source: str) -> str:
    return Path(source).resolve().name if Path(source).is_dir() else source


def read_folder(folder: Path) -> ForeignModel:
    """Read the model of a Hugging Face folder.

    Raises:
        CheckpointError: the folder does not contain a GPT-2, or a file is damaged.
        ConfigError: a size of the model is not valid.
    """
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise CheckpointError(f"{path}: missing; expected a folder of a Hugging Face model")
    notes: list[str] = []
    model_section = from_config_json(read_json_object(path), str(path), notes)
    stored = config_from_json({"model": model_section}, origin=str(path)).model
    weights = _read_weights(folder, stored)
    other = describe_other_tokenizer(folder)
    rows = stored.vocab_size if other else rows_of_the_tokenizer(stored.vocab_size)
    if other:
        notes.append(other)
    notes += describe_dtypes(weights)
    notes += describe_differences(stored, weights, rows, exact_gelu=False)
    weights[TOKEN_EMBEDDING] = weights[TOKEN_EMBEDDING][:rows]
    config = stored.model_copy(update={"vocab_size": rows})
    return ForeignModel(config, weights, notes, other_tokenizer(rows) if other else None)


def has_model(folder: Path) -> bool:
    """Return whether a folder contains a file with a name such as ``model.safetensors``."""
    return any((folder / f"{name}{ending}").is_file() for name in _WEIGHT_FILES for ending in ("", _INDEX_ENDING))


def find_folder(source: str) -> Path:
    """Return ``source`` if it is a local folder. Otherwise, download the model from the hub and return its folder.

    Raises:
        CheckpointError: the folder does not exist, or the download failed.
    """
    path = Path(source)
    if path.exists() or not _HUB_NAME.fullmatch(source) or source.startswith("."):
        if not path.is_dir():
            raise CheckpointError(f"--from-hf {source}: no such folder; expected one with config.json, or a hub name")
        return path
    # Imported here because the import is slow and a local folder does not need this library.
    from huggingface_hub import snapshot_download

    log.info("%s: not a local folder, asking the Hugging Face hub", source)
    try:
        for patterns in _WEIGHT_PATTERNS:
            folder = Path(snapshot_download(source, allow_patterns=[CONFIG_FILE, VOCABULARY_FILE, *patterns]))
            if any(folder.glob(patterns[0])):
                return folder
    except Exception as error:  # the client has dozens of error types: no network, unknown name, no access, ...
        reason = textwrap.shorten(str(error), 300, placeholder=" ...")
        raise CheckpointError(
            f"--from-hf {source}: no such folder here, and the hub does not provide it "
            f"({type(error).__name__}: {reason})"
        ) from error
    raise CheckpointError(f"--from-hf {source}: the model on the hub has neither {WEIGHTS_FILE} nor {_PICKLED_FILE}")


def _read_weights(folder: Path, config: ModelConfig) -> dict[str, Tensor]:
    tensors: dict[str, Any] = {}
    for path in _weight_files(folder):
        if path.suffix == ".bin":
            tensors |= load_pickled_tensors(path, f"the weights of a {_PICKLED_FILE}")
        else:
            with open_tensors(path) as file:
                tensors |= {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a mapping
    weights = read_named_weights(str(folder), tensors)
    require_sizes(str(folder / CONFIG_FILE), weights, config.model_dump(), SIZE_KEYS)
    require_shapes(str(folder), f"'{CONFIG_FILE}'", weights, stored_shapes(config))
    return {name: weight.t() if is_transposed(name) else weight for name, weight in weights.items()}


def _weight_files(folder: Path) -> list[Path]:
    """Return the files that contain the weights, preferably safetensors files."""
    for name in _WEIGHT_FILES:
        if (folder / name).is_file():
            return [folder / name]
        index = folder / f"{name}{_INDEX_ENDING}"
        if index.is_file():
            return _indexed_files(index)
    raise CheckpointError(f"{folder}: holds neither {WEIGHTS_FILE} nor {_PICKLED_FILE}, nor an index of several")


def _indexed_files(index: Path) -> list[Path]:
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise CheckpointError(f"{index}: 'weight_map' must be an object of file names")
    names = sorted(set(weight_map.values()))
    files = {path.name for path in index.parent.iterdir() if path.is_file()}
    for name in names:
        if name not in files:
            raise CheckpointError(f"{index}: names {name!r}, which is not a file beside it")
    return [index.parent / name for name in names]
