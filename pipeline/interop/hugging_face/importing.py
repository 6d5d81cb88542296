"""Reading a folder of ``GPT2LMHeadModel`` (or ``GPT2Model``) as the checkpoint of a run that has not begun.

Weights lie in ``model.safetensors``, in ``pytorch_model.bin``, or in several such files with an index of them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from pipeline.checkpoint.folder import TrainingState
from pipeline.config.loading import config_from_json
from pipeline.config.schema import Config
from pipeline.errors import CheckpointError
from pipeline.interop.conversion import Conversion, expect_unused, write_foreign
from pipeline.interop.foreign import (
    ForeignCheckpoint,
    canonical_keys,
    expect_floats,
    expect_shapes,
    load_pickled_tensors,
    model_shapes,
    streamed_parts,
    without_head,
)
from pipeline.interop.hugging_face.hub import folder_of
from pipeline.interop.hugging_face.layout import CONFIG_FILE, WEIGHTS_FILE, from_config_json, is_transposed

_PICKLED_FILE = "pytorch_model.bin"
_INDEX_SUFFIX = ".index.json"


def import_folder(source: str, run_folder: Path) -> Conversion:
    """Make a run folder of a Hugging Face folder: step 0, zero moments, ``config.json`` to go on with.

    Args:
        source: a folder, or a name on the hub.
        run_folder: has no checkpoints yet.

    Raises:
        CheckpointError: it cannot be had, is not GPT-2, is damaged, or could not be written; nothing is left then.
        ConfigError: one of its settings is no valid one here.
    """
    expect_unused(run_folder)
    return write_foreign(read_folder(folder_of(source), run_folder), run_folder)


def read_folder(folder: Path, run_folder: Path) -> ForeignCheckpoint:
    """Translate a folder; ``run_folder`` becomes ``run.out_dir``. Raises as ``import_folder``."""
    where = str(folder / CONFIG_FILE)
    notes = [f"step 0: {folder} says nothing of its training; moments are zero, the schedule begins"]
    model_section = from_config_json(_read_json(folder / CONFIG_FILE), where, notes)
    config = config_from_json({"run": {"out_dir": str(run_folder)}, "model": model_section}, origin=where)
    weights = _read_weights(folder, config)
    shapes = model_shapes(config.model)
    state = TrainingState(
        step=0, samples=0, tokens=0, updates=0, loss_scale=None, loss_scale_good_steps=0, seed=config.run.seed
    )
    return ForeignCheckpoint(state, shapes, streamed_parts(shapes, weights, {}), config, notes)


def _read_weights(folder: Path, config: Config) -> dict[str, Tensor]:
    """Parameters by canonical name, in our orientation, without padding rows."""
    stored = {**model_shapes(config.model), "wte.weight": [config.model.vocab_size, config.model.n_embd]}
    lying = {name: shape[::-1] if is_transposed(name) else shape for name, shape in stored.items()}
    tensors = dict(_tensors_of(folder))
    keys = canonical_keys(str(folder), tensors)
    weights = {name: expect_floats(f"{folder}: {key!r}", tensors[key]) for name, key in keys.items()}
    weights = without_head(str(folder), weights)
    expect_shapes(str(folder), f"'{CONFIG_FILE}'", weights, lying)
    return {name: weight.t() if is_transposed(name) else weight for name, weight in weights.items()}


def _tensors_of(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """All tensors of a folder's weight files, mapped."""
    for path in _weight_files(folder):
        if path.suffix == ".bin":
            for key, tensor in load_pickled_tensors(path, f"the weights of a {_PICKLED_FILE}").items():
                if not isinstance(tensor, Tensor):
                    raise CheckpointError(f"{path}: {key!r} is {type(tensor).__name__}, expected a tensor")
                yield str(key), tensor
        else:
            yield from _tensors_of_file(path)


def _tensors_of_file(path: Path) -> Iterator[tuple[str, Tensor]]:
    try:
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 - safe_open is no mapping
                yield key, file.get_tensor(key)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error})") from None


def _weight_files(folder: Path) -> list[Path]:
    """The files that hold the weights; safetensors where there are both."""
    for name in (WEIGHTS_FILE, _PICKLED_FILE):
        if (folder / name).is_file():
            return [folder / name]
        index = folder / (name + _INDEX_SUFFIX)
        if index.is_file():
            return [folder / shard for shard in _shards_of(index)]
    raise CheckpointError(f"{folder}: holds no {WEIGHTS_FILE} and no {_PICKLED_FILE}, nor an index of several")


def _shards_of(index: Path) -> list[str]:
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise CheckpointError(f"{index}: 'weight_map' must be an object of file names")
    shards = sorted(set(weight_map.values()))
    for shard in shards:
        if Path(shard).name != shard or not (index.parent / shard).is_file():
            raise CheckpointError(f"{index}: names {shard!r}, which is no file beside it")
    return shards


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(
            f"{path}: cannot be read ({error.strerror}); expected a folder of a Hugging Face model"
        ) from None
    except ValueError as error:
        raise CheckpointError(f"{path}: is not valid JSON ({error})") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: must hold a JSON object")
    return content
