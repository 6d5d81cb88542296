"""Look up the keys of a run config, and find the key that an unknown name probably means."""

import re
from collections.abc import Iterator, Sequence
from typing import Any, get_args

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from pipeline.config.nearest import nearest_name
from pipeline.config.schema import Config

#: The names of keys in nanoGPT, transformers and DeepSpeed whose nearest match here is another key, or none.
NAMES_ELSEWHERE = {
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


def valid_keys(section: type[BaseModel] = Config, prefix: str = "") -> Iterator[str]:
    """Yield the dotted keys of a section and of its nested sections. Each key begins with ``prefix``.

    In a key, ``*`` represents any index of a list.
    """
    for name, field in section.model_fields.items():
        yield f"{prefix}{name}"
        for inner in _sections_in(field.annotation):
            index = "" if inner is field.annotation else "*."
            yield from valid_keys(inner, f"{prefix}{name}.{index}")


def field_at(location: Sequence[int | str]) -> FieldInfo | None:
    """Return the field of the schema for a key, or None if there is no such key. An element of a list has no field.

    Args:
        location: the names of the sections and of the key, and the indices of lists, as in pydantic's errors.
    """
    section: type[BaseModel] | None = Config
    field = None
    for name in location:
        if isinstance(name, int):  # the section of the elements stays the same
            field = None
            continue
        field = section.model_fields.get(name) if section else None
        section = next(_sections_in(field.annotation), None) if field else None
    return field


def find_key(section: str, name: str) -> str | None:
    """Return the dotted key that an unknown ``name`` in a section probably means, or None.

    Args:
        section: the dotted name of the section, or "" for no section.
    """
    for key, names in NAMES_ELSEWHERE.items():
        if name.lower() in names:
            return key
    siblings = keys_in(section)
    others = {key.rpartition(".")[2]: key for key in valid_keys() if "*" not in key}
    for keys, cutoff in ((siblings, 0.5), (others, 0.8)):
        if nearest := nearest_name(name, keys, cutoff):
            return keys[nearest]
    return None


def keys_in(section: str) -> dict[str, str]:
    """Return the names of the keys in a section, with their dotted keys."""
    generic = re.sub(r"\.\d+", ".*", section)  # a number stands for an element of a list
    names = [name for other, _, name in (key.rpartition(".") for key in valid_keys()) if other == generic]
    return {name: f"{section}.{name}" if section else name for name in names}


def _sections_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from _sections_in(argument)
