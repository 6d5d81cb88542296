"""Import nanoGPT's ``ckpt.pt``: the weights, AdamW's moments, and the settings that a run config also has.

The file contains a dict. Its keys are ``model`` and ``optimizer`` (state dicts), ``model_args``, ``iter_num`` and
``config``. build-nanogpt's ``model_*.pt`` differs: ``config`` contains the sizes of the model, and ``step`` replaces
``iter_num``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from pipeline.checkpoint.conversion import require_new_run_folder, write_new_run
from pipeline.checkpoint.state import TrainingState
from pipeline.config.loading import config_from_json
from pipeline.config.schema import Config, ModelConfig, OptimizerConfig, ScheduleConfig
from pipeline.errors import CheckpointError
from pipeline.interop.differences import describe_differences, describe_dtypes, rows_of_the_tokenizer
from pipeline.interop.foreign import (
    TRANSFORMER_PREFIX,
    Conversion,
    ForeignModel,
    model_shapes,
    preset_of,
    read_named_weights,
    read_padded,
    require_finite_floats,
    require_shapes,
    require_sizes,
)
from pipeline.interop.nanogpt_file import NanoGptFile, Section, open_nanogpt_file
from pipeline.model.parameter_state import EXP_AVG, EXP_AVG_SQ, TOKEN_EMBEDDING, WEIGHT

_SIZE_KEYS = {
    **{key: key for key in ("n_layer", "n_head", "n_embd", "vocab_size")},
    "context_length": "block_size",
}
_OPTIMIZER_KEYS = ("learning_rate", "weight_decay", "grad_clip")
_BATCH_KEYS = ("gradient_accumulation_steps", "batch_size", "block_size")
_SCHEDULE_KEYS = ("decay_lr", "max_iters", "lr_decay_iters", "warmup_iters", "min_lr")
#: The settings of the model, which are in ``model_args``, too.
_MODEL_KEYS = ("n_layer", "n_head", "n_embd", "dropout", "bias")
_TRANSLATED_KEYS = {*_OPTIMIZER_KEYS, "beta1", "beta2", *_BATCH_KEYS, *_SCHEDULE_KEYS, *_MODEL_KEYS}

_WEIGHTS_ONLY = "remove 'optimizer' from the file to import its weights alone"


def import_nanogpt(path: Path, run_folder: Path) -> Conversion:
    """Convert a ``ckpt.pt`` of nanoGPT to a new run folder.

    Raises:
        CheckpointError: the file is not a valid ``ckpt.pt``, or the run folder has checkpoints or cannot be written.
        ConfigError: a setting in the file is not valid for a run, or another process is using the run folder.
    """
    require_new_run_folder(run_folder)
    file = open_nanogpt_file(path)
    model, stored = _read_model(file)
    notes = [*model.notes]
    config = _translate_config(file, model.config, run_folder, notes)
    stored_shapes = _stored_shapes(stored, file.model_args)
    moments, updates = _read_moments(file.content, stored_shapes, model.config.vocab_size)
    state = _training_state(file, config, updates, notes)
    if not moments:
        notes.append("moments: none in the file; they are zero")
    shapes = model_shapes(config.model)
    read = partial(read_padded, {WEIGHT: model.weights, **moments}, shapes)
    return Conversion(write_new_run(run_folder, config, state, shapes, read), notes)


def read_nanogpt_model(path: Path) -> ForeignModel:
    """Read the model from a file of nanoGPT. The optimizer state is not read.

    Raises:
        CheckpointError: the file is not a valid ``ckpt.pt``.
        ConfigError: a size of the model is not valid.
    """
    return _read_model(open_nanogpt_file(path))[0]


def _read_model(file: NanoGptFile) -> tuple[ForeignModel, ModelConfig]:
    section = file.content.section("model")
    weights = read_named_weights(section.where, section.content)
    sizes = {ours: file.model_args.require(theirs, int) for ours, theirs in _SIZE_KEYS.items()}
    require_sizes(file.model_args.where, weights, sizes, _SIZE_KEYS)
    dropout = file.model_args.get("dropout", float) or 0.0
    model_section = {**preset_of(sizes), **sizes, "dropout": dropout}
    stored = config_from_json({"model": model_section}, origin=file.model_args.where).model
    require_shapes(section.where, "'model_args'", weights, _stored_shapes(stored, file.model_args))
    rows = rows_of_the_tokenizer(stored.vocab_size)
    notes = describe_dtypes(weights)
    notes += describe_differences(stored, weights, rows, exact_gelu=not file.is_build_nanogpt)
    if len(weights) < len(model_shapes(stored)):
        notes.append("biases: none in the file; they are zero, and training changes them from there")
    weights[TOKEN_EMBEDDING] = weights[TOKEN_EMBEDDING][:rows]
    return ForeignModel(stored.model_copy(update={"vocab_size": rows}), weights, notes), stored


def _name_of(path: Path) -> str:
    return "/".join(path.resolve().parts[-2:])


def _stored_shapes(stored: ModelConfig, model_args: Section) -> dict[str, list[int]]:
    """Return the shapes that the file must contain. If ``bias`` is False, the result has no biases."""
    has_biases = model_args.get("bias", bool) is not False
    shapes = {**model_shapes(stored), TOKEN_EMBEDDING: [stored.vocab_size, stored.n_embd]}
    return {name: shape for name, shape in shapes.items() if has_biases or not name.endswith(".bias")}


def _translate_config(file: NanoGptFile, model: ModelConfig, run_folder: Path, notes: list[str]) -> Config:
    given = file.settings.content
    beta1, beta2 = OptimizerConfig().betas
    sections: dict[str, dict[str, Any]] = {
        "run": {"name": _name_of(file.path), "out_dir": str(run_folder)},
        "model": model.model_dump(),
        "optimizer": {
            **{key: given[key] for key in _OPTIMIZER_KEYS if key in given},
            "betas": [given.get("beta1", beta1), given.get("beta2", beta2)],
        },
        "schedule": _translate_schedule(file.settings, notes),
    }
    if tokens := _tokens_per_step(file.settings):
        sections["batch"] = {"tokens_per_step": tokens, "micro_batch_size": file.settings.require("batch_size", int)}
    if file.settings.get("block_size", int) not in (None, model.context_length):
        sections["data"] = {"seq_len": given["block_size"]}
    if not given:
        notes.append("settings: the file has none of the training run; ours are the defaults")
    if ignored := sorted(str(key) for key in given if key not in _TRANSLATED_KEYS):
        notes.append(f"settings: not imported: {', '.join(ignored)}")
    return config_from_json(sections, origin=str(file.path))


def _translate_schedule(settings: Section, notes: list[str]) -> dict[str, Any]:
    """Return a schedule with nanoGPT's learning rates. Only the warm-up differs slightly.

    The new run ends at the end of the decay. nanoGPT may train longer.
    """
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


def _tokens_per_step(settings: Section) -> int | None:
    """Return the batch size in tokens over all ranks, or None if a setting is missing."""
    if any(key not in settings.content for key in _BATCH_KEYS):
        return None
    return math.prod(settings.require(key, int) for key in _BATCH_KEYS)


def _training_state(file: NanoGptFile, config: Config, updates: int | None, notes: list[str]) -> TrainingState:
    """Return the training state. nanoGPT draws batches at random, so the state has no position in the data."""
    step = file.steps
    tokens = _tokens_per_step(file.settings)
    if tokens is None:
        notes.append("tokens: the file does not say how many tokens a step has; the count starts at 0")
    notes.append("data: the file does not say which data were read; the position in the data starts at 0")
    if step < (warmup_steps := config.schedule.warmup_steps) and file.settings.content:
        notes.append(f"warm-up: step k has k / {warmup_steps} of the peak rate here, k / {warmup_steps + 1} in nanoGPT")
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
    file: Section, stored_shapes: Mapping[str, list[int]], kept_rows: int
) -> tuple[dict[str, dict[str, Tensor]], int | None]:
    """Return AdamW's moments by canonical name, and AdamW's step count. Without moments, return ({}, None).

    The result contains only the first ``kept_rows`` rows of the embedding's moments.

    AdamW numbers the parameters in two groups: first those with at least two dimensions, then all others. Within a
    group, they are in the model's order.
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
        numbers += Section(f"{optimizer.where}: param_groups", group).require("params", list)
    names = sorted(stored_shapes, key=lambda name: len(stored_shapes[name]) < 2)  # sorted() is stable
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
            tensors[name] = require_finite_floats(f"{entry.where}: {kind!r}", entry.require(kind, Tensor))
            if list(tensors[name].shape) != stored_shapes[name]:
                raise CheckpointError(
                    f"{entry.where}: {kind!r} has shape {list(tensors[name].shape)}, expected {stored_shapes[name]} of "
                    f"'{TRANSFORMER_PREFIX}{name}'; {_WEIGHTS_ONLY}"
                )
        if moments[EXP_AVG_SQ][name].min() < 0:
            raise CheckpointError(f"{entry.where}: '{EXP_AVG_SQ}' holds negative numbers; {_WEIGHTS_ONLY}")
    if len(counts) != 1:
        raise CheckpointError(f"{state.where}: 'step' differs among parameters: {sorted(counts)}; {_WEIGHTS_ONLY}")
    for tensors in moments.values():
        tensors[TOKEN_EMBEDDING] = tensors[TOKEN_EMBEDDING][:kept_rows]
    return moments, counts.pop()


def _step_count(entry: Section) -> int:
    """Return AdamW's step count for a parameter. torch stores the count as a tensor or as a number."""
    count = entry.content.get("step")
    if isinstance(count, Tensor) and count.numel() == 1:
        count = count.item()
    if isinstance(count, float) and count.is_integer():
        count = int(count)
    if not isinstance(count, int) or count < 0:
        raise CheckpointError(f"{entry.where}: 'step' must be a whole number, found {count!r}")
    return count
