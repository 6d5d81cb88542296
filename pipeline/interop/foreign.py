"""Helpers to import a GPT-2 from another program: names, the tied weight, dtypes, shapes and missing tensors."""

import re
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor

from pipeline.checkpoint.saving import SavedCheckpoint
from pipeline.config.schema import MODEL_PRESETS, ModelConfig
from pipeline.errors import CheckpointError
from pipeline.model.gpt2 import allocate_model

#: The prefix of GPT-2's parameters in a model with an output layer, in nanoGPT and in transformers.
TRANSFORMER_PREFIX = "transformer."
_COMPILED_PREFIX = "_orig_mod."  # torch.compile adds it
_MASK_SUFFIXES = (".attn.bias", ".attn.masked_bias")  # some versions store the causal mask as buffers


@dataclass(frozen=True)
class Conversion:
    """A checkpoint that was written into a new run folder."""

    saved: SavedCheckpoint
    notes: list[str]  # for the user, about what was translated

    def __str__(self) -> str:
        return "\n".join([str(self.saved), *self.notes])


def load_pickled_tensors(path: Path, expected: str) -> dict[Any, Any]:
    """Load a dict that ``torch.save`` wrote, with its tensors mapped. No code in the file is run.

    Args:
        expected: what the file should be, for the error message.

    Raises:
        CheckpointError: the file is something else, is damaged, or holds objects other than tensors and plain values.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # Files from before torch 1.6 are not archives and cannot be mapped.
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # a damaged pickle can raise anything
        if isinstance(error, UnpicklingError) and (culprit := re.search(r"GLOBAL (\S+)", str(error))):
            raise CheckpointError(
                f"{path}: holds {culprit[1]}, and only tensors and plain values are loaded, because anything else "
                f"could run code; expected {expected}"
            ) from None
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(
            f"{path}: cannot be read as a file of torch.save ({reason}); expected a checkpoint folder, a run folder, "
            f"or {expected}"
        ) from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: does not hold a dict; expected {expected}")
    return content


def read_named_weights(where: str, state_dict: Mapping[Any, Any]) -> dict[str, Tensor]:
    """Return the parameters of a state dict by canonical name, with the tied weight once and without masks.

    Raises:
        CheckpointError: a value is not a tensor of floats, a parameter is stored twice, or the output layer differs
            from the embedding.
    """
    weights: dict[str, Tensor] = {}
    for key, value in state_dict.items():
        name = str(key).removeprefix(_COMPILED_PREFIX).removeprefix(TRANSFORMER_PREFIX)
        if name in weights:
            raise CheckpointError(f"{where}: {key!r} is stored twice, with and without a prefix")
        if not name.endswith(_MASK_SUFFIXES):
            weights[name] = require_floats(f"{where}: {key!r}", value)
    head = weights.pop("lm_head.weight", None)
    if head is not None and not _are_equal(head, weights.get("wte.weight", head)):
        raise CheckpointError(
            f"{where}: 'lm_head.weight' differs from '{TRANSFORMER_PREFIX}wte.weight'; GPT-2 has one weight for both"
        )
    return weights


def _are_equal(first: Tensor, second: Tensor) -> bool:
    """Return whether two tensors share their memory or are equal. NaN equals NaN only in the first case."""
    return (first.data_ptr(), first.shape) == (second.data_ptr(), second.shape) or torch.equal(first, second)


def require_floats(what: str, value: Any) -> Tensor:
    """Return a value as a detached tensor, or raise CheckpointError if it is not a dense CPU tensor of floats."""
    if not isinstance(value, Tensor):
        raise CheckpointError(f"{what} must be Tensor, found {type(value).__name__}")
    if not value.is_floating_point() or value.layout != torch.strided or value.device.type != "cpu":
        raise CheckpointError(f"{what} is {value.dtype}, {value.layout} on {value.device}; expected floats in memory")
    return value.detach()


def require_shapes(where: str, source: str, weights: Mapping[str, Tensor], expected: dict[str, list[int]]) -> None:
    """Raise CheckpointError unless ``weights`` are exactly the ``expected`` parameters in these shapes.

    Args:
        source: where the sizes of the model are given, for the error message.
    """
    for name in [*expected, *weights]:
        key = f"{where}: '{TRANSFORMER_PREFIX}{name}'"
        if name not in weights:
            raise CheckpointError(f"{key} is missing; {source} requires it")
        if name not in expected:
            raise CheckpointError(f"{key} does not exist in the GPT-2 of {source}")
        if list(weights[name].shape) != expected[name]:
            raise CheckpointError(f"{key} has shape {list(weights[name].shape)}, expected {expected[name]}")


def model_shapes(config: ModelConfig) -> dict[str, list[int]]:
    """Return the shapes of our parameters, padding rows included, by canonical name."""
    return {name: list(p.shape) for name, p in allocate_model(config, "meta").named_parameters()}


def preset_of(sizes: dict[str, int]) -> dict[str, str]:
    """Return the key ``preset`` of a model section with these sizes, or nothing if no preset has them."""
    return next(({"preset": name} for name, preset in MODEL_PRESETS.items() if preset == sizes), {})


def read_padded(
    tensors: Mapping[str, Mapping[str, Tensor]], shapes: dict[str, list[int]], kind: str, name: str
) -> Tensor:
    """Return a tensor in our shape, with rows of zeros for our padding. A missing tensor is all zeros.

    Args:
        tensors: kind (``weight``, ``exp_avg`` or ``exp_avg_sq``) -> canonical name -> tensor.
    """
    tensor = tensors.get(kind, {}).get(name)
    if tensor is not None and list(tensor.shape) == shapes[name]:
        return tensor
    padded = torch.zeros(shapes[name])
    if tensor is not None:
        padded[: tensor.shape[0]] = tensor
    return padded
