"""Importing nanoGPT's ``ckpt.pt``: weights, AdamW's moments, and the settings that exist here too.

The file holds a dict: ``model`` (a state dict), ``optimizer`` (AdamW's), ``model_args``, ``iter_num`` and ``config``.
Its matrices have the same orientation as ours.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from data_tools.tokenizer import GPT2_VOCAB_SIZE
from pipeline.checkpoint.conversion import require_new_run_folder, write_new_run
from pipeline.checkpoint.pieces import EXP_AVG, EXP_AVG_SQ, WEIGHT
from pipeline.checkpoint.state import TrainingState
from pipeline.config.loading import config_from_json
from pipeline.config.schema import Config, OptimizerConfig, ScheduleConfig
from pipeline.errors import CheckpointError
from pipeline.interop.foreign import (
    TRANSFORMER_PREFIX,
    Conversion,
    load_pickled_tensors,
    model_shapes,
    preset_of,
    read_named_weights,
    read_padded,
    require_floats,
    require_shapes,
)
from pipeline.model.output_layer import padded_vocab_size

_EXPECTED = "the ckpt.pt of nanoGPT's train.py"
_SIZE_KEYS = {"n_layer": "n_layer", "n_head": "n_head", "n_embd": "n_embd", "block_size": "context_length"}
_OPTIMIZER_KEYS = ("learning_rate", "weight_decay", "grad_clip")
_BATCH_KEYS = ("gradient_accumulation_steps", "batch_size", "block_size")

_WEIGHTS_ONLY = "remove 'optimizer' from the file to import its weights alone"


def import_nanogpt(path: Path, run_folder: Path) -> Conversion:
    """Write the contents of a ``ckpt.pt`` into a new run folder. Tensors are read when they are written.

    Raises:
        CheckpointError: the file is something else, is damaged, would run code, or holds a wrong tensor; or as for
            ``write_new_run``.
        ConfigError: one of its settings is not valid here, or a run is using the folder.
    """
    require_new_run_folder(run_folder)
    file = _Section(str(path), load_pickled_tensors(path, _EXPECTED))
    model_args = file.section("model_args")
    settings = file.section("config") if "config" in file.content else _Section(f"{path}: config", {})
    notes: list[str] = []

    model = file.section("model")
    weights = read_named_weights(model.where, model.content)
    _require_sizes(model_args, weights)
    config = _translate_config(path, model_args, settings, run_folder, notes)
    shapes = model_shapes(config.model)
    stored_shapes = _stored_shapes(shapes, model_args)
    require_shapes(model.where, "'model_args'", weights, stored_shapes)
    moments, updates = _read_moments(file, stored_shapes)

    state = _training_state(file, settings, config, updates, notes)
    if len(weights) < len(shapes):
        notes.append("biases: none in the file; they are zero, and training changes them from there")
    if not moments:
        notes.append("moments: none in the file; they are zero")
    read = partial(read_padded, {WEIGHT: weights, **moments}, shapes)
    return Conversion(write_new_run(run_folder, config, state, shapes, read), notes)


@dataclass(frozen=True)
class _Section:
    """A dict in the file. Its items are checked when they are read."""

    where: str
    content: dict[Any, Any]

    def get(self, key: Any, kind: type[Any]) -> Any | None:
        """Return an item, or None if it is missing. Raise CheckpointError if it has another type.

        An int is accepted as a float.
        """
        if key not in self.content:
            return None
        value = self.content[key]
        kinds = (int, float) if kind is float else kind
        if not isinstance(value, kinds) or (isinstance(value, bool) and kind is not bool):
            raise CheckpointError(f"{self.where}: {key!r} must be {kind.__name__}, found {type(value).__name__}")
        return value

    def require(self, key: Any, kind: type[Any]) -> Any:
        """Return an item, or raise CheckpointError if it is missing or has another type."""
        if key not in self.content:
            raise CheckpointError(f"{self.where}: has no {key!r}; expected {_EXPECTED}")
        return self.get(key, kind)

    def section(self, key: Any) -> _Section:
        """Return a dict inside this one. Raises like ``require``."""
        return _Section(f"{self.where}: {key}", self.require(key, dict))


def _require_sizes(model_args: _Section, weights: dict[str, Tensor]) -> None:
    """Raise CheckpointError if the sizes contradict the weights, before a model of wrong and huge sizes is created."""
    width = model_args.require("n_embd", int)
    for name, key in (("wte.weight", "vocab_size"), ("wpe.weight", "block_size")):
        rows = model_args.require(key, int)
        if name in weights and weights[name].shape != (rows, width):
            raise CheckpointError(
                f"{model_args.where}: give [{rows}, {width}] for '{TRANSFORMER_PREFIX}{name}', which has shape "
                f"{list(weights[name].shape)}"
            )
    blocks = {name.split(".")[1] for name in weights if name.startswith("h.")}
    if (n_layer := model_args.require("n_layer", int)) != len(blocks):
        raise CheckpointError(f"{model_args.where}: 'n_layer' is {n_layer}, and the file has {len(blocks)} blocks")


def _stored_shapes(shapes: dict[str, list[int]], model_args: _Section) -> dict[str, list[int]]:
    """Return the shapes that the file must hold: without our padding rows, and without biases if it has none."""
    has_biases = model_args.get("bias", bool) is not False
    stored = {name: shape for name, shape in shapes.items() if has_biases or not name.endswith(".bias")}
    return {**stored, "wte.weight": [model_args.require("vocab_size", int), shapes["wte.weight"][1]]}


def _translate_config(
    path: Path, model_args: _Section, settings: _Section, run_folder: Path, notes: list[str]
) -> Config:
    """Return the run config with the file's settings, and our defaults for all others."""
    given = settings.content
    beta1, beta2 = OptimizerConfig().betas
    sections: dict[str, dict[str, Any]] = {
        "run": {"out_dir": str(run_folder)},
        "model": _translate_model(model_args, notes),
        "optimizer": {
            **{key: given[key] for key in _OPTIMIZER_KEYS if key in given},
            "betas": [given.get("beta1", beta1), given.get("beta2", beta2)],
        },
        "schedule": _translate_schedule(settings, notes),
    }
    if tokens := _tokens_per_step(settings):
        sections["batch"] = {"tokens_per_step": tokens, "micro_batch_size": settings.require("batch_size", int)}
    if settings.get("block_size", int) not in (None, model_args.content["block_size"]):
        sections["data"] = {"seq_len": given["block_size"]}
    return config_from_json(sections, origin=str(path))


def _translate_model(model_args: _Section, notes: list[str]) -> dict[str, Any]:
    sizes = {ours: model_args.require(theirs, int) for theirs, ours in _SIZE_KEYS.items()}
    vocab_size = model_args.require("vocab_size", int)
    if vocab_size == padded_vocab_size(GPT2_VOCAB_SIZE):
        notes.append(
            f"vocabulary: {vocab_size} rows are GPT-2's {GPT2_VOCAB_SIZE} and padding, which is not part of the "
            "softmax here"
        )
        vocab_size = GPT2_VOCAB_SIZE
    dropout = model_args.get("dropout", float) or 0.0
    return {**preset_of(sizes), **sizes, "vocab_size": vocab_size, "dropout": dropout}


def _translate_schedule(settings: _Section, notes: list[str]) -> dict[str, Any]:
    """Keep the learning rate's curve. Our runs end where its cosine ends; nanoGPT's may end elsewhere."""
    default, max_iters = ScheduleConfig(), settings.get("max_iters", int)
    if settings.content.get("decay_lr") is False:
        return {"warmup_steps": 0, "max_steps": max_iters or default.max_steps, "min_lr_ratio": 1.0}
    max_steps = settings.get("lr_decay_iters", int) or max_iters or default.max_steps
    warmup_steps = settings.get("warmup_iters", int)
    if warmup_steps is None:
        warmup_steps = min(default.warmup_steps, max_steps)
    max_steps = max(max_steps, warmup_steps)
    if max_iters not in (None, max_steps):
        notes.append(f"schedule: the run ends with its learning rate's curve, at {max_steps}, not at {max_iters}")
    min_lr = settings.get("min_lr", float)
    peak = settings.get("learning_rate", float) or OptimizerConfig().learning_rate
    ratio = default.min_lr_ratio if min_lr is None else min_lr / peak
    return {"warmup_steps": warmup_steps, "max_steps": max_steps, "min_lr_ratio": ratio}


def _tokens_per_step(settings: _Section) -> int | None:
    """Return the batch size in tokens over all ranks, or None if a setting is missing."""
    if any(key not in settings.content for key in _BATCH_KEYS):
        return None
    return math.prod(settings.require(key, int) for key in _BATCH_KEYS)


def _training_state(
    file: _Section, settings: _Section, config: Config, updates: int | None, notes: list[str]
) -> TrainingState:
    """Return the state to continue from. nanoGPT draws its batches at random, so no position in the data is known."""
    step = file.require("iter_num", int)
    if step < 0:
        raise CheckpointError(f"{file.where}: 'iter_num' must be at least 0, it is {step}")
    tokens = _tokens_per_step(settings)
    if tokens is None:
        notes.append("tokens: the file does not say how many tokens a step has; the count starts at 0")
    return TrainingState(
        step=step,
        samples=0,
        tokens=step * (tokens or 0),
        updates=step if updates is None else updates,
        loss_scale=None,
        loss_scale_good_steps=0,
        seed=config.run.seed,
    )


def _read_moments(
    file: _Section, stored_shapes: dict[str, list[int]]
) -> tuple[dict[str, dict[str, Tensor]], int | None]:
    """Return AdamW's moments by canonical name and its step count, or nothing if the file has none.

    AdamW numbers the parameters across its groups: those with at least two dimensions first, then the others, each in
    the order of the model's parameters.
    """
    if file.content.get("optimizer") is None:
        return {}, None
    optimizer = file.section("optimizer")
    state = optimizer.section("state")
    if not state.content:
        return {}, None
    numbers: list[Any] = []
    for group in optimizer.require("param_groups", list):
        if not isinstance(group, dict):
            raise CheckpointError(f"{optimizer.where}: 'param_groups' must hold dicts, found {type(group).__name__}")
        numbers += _Section(f"{optimizer.where}: param_groups", group).require("params", list)
    names = sorted(stored_shapes, key=lambda name: len(stored_shapes[name]) < 2)  # a stable sort
    if len(numbers) != len(names):
        raise CheckpointError(
            f"{optimizer.where}: has {len(numbers)} parameters, the model {len(names)}; {_WEIGHTS_ONLY}"
        )
    moments: dict[str, dict[str, Tensor]] = {EXP_AVG: {}, EXP_AVG_SQ: {}}
    counts = set()
    for number, name in zip(numbers, names, strict=True):
        entry = state.section(number)
        counts.add(_step_count(entry))
        for kind, tensors in moments.items():
            tensors[name] = require_floats(f"{entry.where}: {kind!r}", entry.require(kind, Tensor))
            if list(tensors[name].shape) != stored_shapes[name]:
                raise CheckpointError(
                    f"{entry.where}: {kind!r} has shape {list(tensors[name].shape)}, expected {stored_shapes[name]} of "
                    f"'{TRANSFORMER_PREFIX}{name}'; {_WEIGHTS_ONLY}"
                )
    if len(counts) != 1:
        raise CheckpointError(f"{state.where}: 'step' differs among parameters: {sorted(counts)}; {_WEIGHTS_ONLY}")
    return moments, counts.pop()


def _step_count(entry: _Section) -> int:
    """Return AdamW's step count of a parameter, which torch stores as a tensor or as a number."""
    count = entry.content.get("step")
    if isinstance(count, Tensor) and count.numel() == 1:
        count = count.item()
    if not isinstance(count, (int, float)) or not float(count).is_integer() or count < 0:
        raise CheckpointError(f"{entry.where}: 'step' must be a whole number, found {count!r}")
    return int(count)
