"""Reading nanoGPT's ``ckpt.pt``: weights, AdamW's moments, and those of its settings that we have too.

The file holds a dict: ``model`` (a state dict), ``optimizer`` (AdamW's), ``model_args``, ``iter_num`` and ``config``.
Its matrices lie as ours do. What would need code of the file to be run is refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from data_tools.tokenizer import GPT2_VOCAB_SIZE
from pipeline.checkpoint.folder import TrainingState
from pipeline.checkpoint.pieces import EXP_AVG, EXP_AVG_SQ
from pipeline.config.loading import config_from_json
from pipeline.config.schema import Config, OptimizerConfig, ScheduleConfig
from pipeline.errors import CheckpointError
from pipeline.interop.foreign import (
    ForeignCheckpoint,
    Moments,
    canonical_keys,
    expect_floats,
    expect_shapes,
    load_pickled_tensors,
    model_shapes,
    preset_of,
    streamed_parts,
    without_head,
)
from pipeline.model.gpt2 import padded_vocab_size

_EXPECTED = "the ckpt.pt of nanoGPT's train.py"
_PREFIX = "transformer."
_MODEL_KEYS = {"n_layer": "n_layer", "n_head": "n_head", "n_embd": "n_embd", "block_size": "context_length"}
_OPTIMIZER_KEYS = ("learning_rate", "weight_decay", "grad_clip")

_DROP_IT = "remove 'optimizer' from the file to take its weights alone"


def read_nanogpt(path: Path, run_folder: Path) -> ForeignCheckpoint:
    """Translate a ``ckpt.pt``. Tensors that are fp32 already stay mapped from the file.

    Args:
        run_folder: becomes ``run.out_dir``.

    Raises:
        CheckpointError: it is none, is damaged, wants code to be run, or a tensor is not what it should be.
        ConfigError: one of its settings is no valid one here.
    """
    file = _Mapping(str(path), load_pickled_tensors(path, _EXPECTED))
    model_args = file.part("model_args")
    settings = file.part("config") if "config" in file.content else _Mapping(f"{path}: config", {})
    notes: list[str] = []

    weights = _named_weights(file.part("model"))
    _expect_sizes(model_args, weights)
    config = _translate_config(path, model_args, settings, run_folder, notes)
    shapes = model_shapes(config.model)
    stored = _stored_shapes(shapes, model_args)
    expect_shapes(f"{path}: model", "'model_args'", weights, stored)
    moments, updates = _read_moments(file, stored)

    state = _training_state(file, settings, config, updates, notes)
    if len(weights) < len(shapes):
        notes.append("biases: none in the file; they are zero, and training moves them from there")
    if not moments:
        notes.append("moments: none in the file; they are zero")
    return ForeignCheckpoint(state, shapes, streamed_parts(shapes, weights, moments), config, notes)


@dataclass(frozen=True)
class _Mapping:
    """A dict in the file, whose items are checked as they are taken."""

    where: str
    content: dict[Any, Any]

    def take(self, key: Any, kind: type[Any]) -> Any:
        """An item that must be there; an int will do for a float.

        Raises:
            CheckpointError: it is not, or is of another type.
        """
        if key not in self.content:
            raise CheckpointError(f"{self.where}: has no {key!r}; expected {_EXPECTED}")
        value = self.content[key]
        kinds = (int, float) if kind is float else kind
        if not isinstance(value, kinds) or (isinstance(value, bool) and kind is not bool):
            raise CheckpointError(f"{self.where}: {key!r} must be {kind.__name__}, found {type(value).__name__}")
        return value

    def take_if_there(self, key: Any, kind: type[Any]) -> Any | None:
        """As ``take``; None where there is no such item."""
        return self.take(key, kind) if key in self.content else None

    def part(self, key: Any) -> _Mapping:
        """A dict in this one."""
        return _Mapping(f"{self.where}: {key}", self.take(key, dict))


def _named_weights(model: _Mapping) -> dict[str, Tensor]:
    """The state dict's parameters by canonical name, the tied weight once."""
    keys = canonical_keys(model.where, model.content)
    return without_head(model.where, {name: _floats(model, key) for name, key in keys.items()})


def _floats(part: _Mapping, key: Any) -> Tensor:
    return expect_floats(f"{part.where}: {key!r}", part.take(key, Tensor))


def _expect_sizes(model_args: _Mapping, weights: dict[str, Tensor]) -> None:
    """Before a model of these sizes is laid out: a wrong number may be of any size."""
    width = model_args.take("n_embd", int)
    embeddings = {"wte.weight": model_args.take("vocab_size", int), "wpe.weight": model_args.take("block_size", int)}
    for name, rows in embeddings.items():
        if name in weights and weights[name].shape != (rows, width):
            raise CheckpointError(
                f"{model_args.where}: say [{rows}, {width}] for '{_PREFIX}{name}', which has shape "
                f"{list(weights[name].shape)}"
            )
    blocks = {name.split(".")[1] for name in weights if name.startswith("h.")}
    if model_args.take("n_layer", int) != len(blocks):
        raise CheckpointError(
            f"{model_args.where}: 'n_layer' is {model_args.content['n_layer']}, and the file has {len(blocks)} blocks"
        )


def _stored_shapes(shapes: dict[str, list[int]], model_args: _Mapping) -> dict[str, list[int]]:
    """What the file must hold: no padding rows of ours, and without biases where the model has none."""
    has_biases = model_args.take_if_there("bias", bool) is not False
    stored = {name: shape for name, shape in shapes.items() if has_biases or not name.endswith(".bias")}
    return {**stored, "wte.weight": [model_args.take("vocab_size", int), shapes["wte.weight"][1]]}


def _translate_config(
    path: Path, model_args: _Mapping, settings: _Mapping, run_folder: Path, notes: list[str]
) -> Config:
    """What the file says, over our defaults."""
    given = settings.content
    optimizer = {key: given[key] for key in _OPTIMIZER_KEYS if key in given}
    first, second = OptimizerConfig().betas
    sections: dict[str, dict[str, Any]] = {
        "run": {"out_dir": str(run_folder)},
        "model": _translate_model(model_args, notes),
        "optimizer": {**optimizer, "betas": [given.get("beta1", first), given.get("beta2", second)]},
        "schedule": _translate_schedule(settings, notes),
    }
    if tokens := _tokens_per_iteration(settings):
        sections["batch"] = {"tokens_per_step": tokens, "micro_batch_size": settings.take("batch_size", int)}
    if settings.take_if_there("block_size", int) not in (None, model_args.content["block_size"]):
        sections["data"] = {"seq_len": given["block_size"]}
    return config_from_json(sections, origin=str(path))


def _translate_model(model_args: _Mapping, notes: list[str]) -> dict[str, Any]:
    sizes = {ours: model_args.take(theirs, int) for theirs, ours in _MODEL_KEYS.items()}
    vocab_size = model_args.take("vocab_size", int)
    if vocab_size == padded_vocab_size(GPT2_VOCAB_SIZE):
        vocab_size = GPT2_VOCAB_SIZE
        notes.append(
            f"vocabulary: {padded_vocab_size(GPT2_VOCAB_SIZE)} rows are GPT-2's {GPT2_VOCAB_SIZE} and padding, "
            "which has no part in the softmax here"
        )
    return {
        **preset_of(sizes),
        **sizes,
        "vocab_size": vocab_size,
        "dropout": model_args.take_if_there("dropout", float) or 0.0,
    }


def _translate_schedule(settings: _Mapping, notes: list[str]) -> dict[str, Any]:
    """The curve is kept. Ours ends where its cosine does; nanoGPT's two ends may differ."""
    default, last_step = ScheduleConfig(), settings.take_if_there("max_iters", int)
    if settings.content.get("decay_lr") is False:
        return {"warmup_steps": 0, "max_steps": last_step or default.max_steps, "min_lr_ratio": 1.0}
    max_steps = settings.take_if_there("lr_decay_iters", int) or last_step or default.max_steps
    warmup_steps = settings.take_if_there("warmup_iters", int)
    if warmup_steps is None:
        warmup_steps = min(default.warmup_steps, max_steps)
    max_steps = max(max_steps, warmup_steps)
    if last_step not in (None, max_steps):
        notes.append(f"schedule: the run ends with its learning rate's curve, at {max_steps}, not at {last_step}")
    floor = settings.take_if_there("min_lr", float)
    peak = settings.take_if_there("learning_rate", float) or OptimizerConfig().learning_rate
    ratio = default.min_lr_ratio if floor is None else floor / peak
    return {"warmup_steps": warmup_steps, "max_steps": max_steps, "min_lr_ratio": ratio}


def _tokens_per_iteration(settings: _Mapping) -> int | None:
    """None where the settings do not say. nanoGPT counts accumulation over all ranks."""
    factors = [settings.take_if_there(k, int) for k in ("gradient_accumulation_steps", "batch_size", "block_size")]
    tokens = 1
    for factor in factors:
        if factor is None:
            return None
        tokens *= factor
    return tokens


def _training_state(
    file: _Mapping, settings: _Mapping, config: Config, updates: int | None, notes: list[str]
) -> TrainingState:
    """nanoGPT draws its batches at random: there is no position in the data to go on from."""
    step = file.take("iter_num", int)
    if step < 0:
        raise CheckpointError(f"{file.where}: 'iter_num' must be at least 0, it is {step}")
    tokens = _tokens_per_iteration(settings)
    if tokens is None:
        notes.append("tokens: the file does not say how many a step has; they count from 0")
    return TrainingState(
        step=step,
        samples=0,
        tokens=step * (tokens or 0),
        updates=step if updates is None else updates,
        loss_scale=None,
        loss_scale_good_steps=0,
        seed=config.run.seed,
    )


def _read_moments(file: _Mapping, stored: dict[str, list[int]]) -> tuple[Moments, int | None]:
    """AdamW's moments by canonical name, and its own step count; nothing where the file has none.

    It numbers the parameters through its groups: those of two dimensions or more, then the others, each in the
    order in which the model names them.
    """
    if file.content.get("optimizer") is None:
        return {}, None
    optimizer = file.part("optimizer")
    state = optimizer.part("state")
    if not state.content:
        return {}, None
    numbers = [number for group in optimizer.take("param_groups", list) for number in _numbers_of(optimizer, group)]
    names = sorted(stored, key=lambda name: len(stored[name]) < 2)  # a stable sort
    if len(numbers) != len(names):
        raise CheckpointError(f"{optimizer.where}: has {len(numbers)} parameters, the model {len(names)}; {_DROP_IT}")
    moments: Moments = {EXP_AVG: {}, EXP_AVG_SQ: {}}
    counts = set()
    for number, name in zip(numbers, names, strict=True):
        entry = state.part(number)
        counts.add(_step_count(entry))
        for kind, tensors in moments.items():
            tensors[name] = _floats(entry, kind)
            if list(tensors[name].shape) != stored[name]:
                raise CheckpointError(
                    f"{entry.where}: {kind!r} has shape {list(tensors[name].shape)}, expected {stored[name]} of "
                    f"'{_PREFIX}{name}'; {_DROP_IT}"
                )
    if len(counts) != 1:
        raise CheckpointError(f"{state.where}: 'step' differs among parameters: {sorted(counts)}; {_DROP_IT}")
    return moments, counts.pop()


def _numbers_of(optimizer: _Mapping, group: Any) -> list[Any]:
    if not isinstance(group, dict):
        raise CheckpointError(f"{optimizer.where}: 'param_groups' must hold dicts, found {type(group).__name__}")
    numbers: list[Any] = _Mapping(f"{optimizer.where}: param_groups", group).take("params", list)
    return numbers


def _step_count(entry: _Mapping) -> int:
    """torch keeps it in a tensor, or as a number."""
    count = entry.content.get("step")
    if isinstance(count, Tensor) and count.numel() == 1:
        count = count.item()
    if not isinstance(count, (int, float)) or count != int(count) or count < 0:
        raise CheckpointError(f"{entry.where}: 'step' must be a whole number, found {count!r}")
    return int(count)
