"""What the files of other programs have in common: GPT-2's names, one weight for two places, no moments or some."""

from __future__ import annotations

import re
import warnings
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor

from pipeline.checkpoint.folder import TrainingState
from pipeline.checkpoint.pieces import EXP_AVG, EXP_AVG_SQ, WEIGHT, piece_key
from pipeline.checkpoint.tensor_stream import StreamedTensor
from pipeline.config.schema import MODEL_PRESETS, Config, ModelConfig
from pipeline.errors import CheckpointError
from pipeline.model.gpt2 import allocate_model

_COMPILED_PREFIX = "_orig_mod."  # of a model that torch.compile had wrapped
_PREFIX = "transformer."
_MASK_SUFFIXES = (".attn.bias", ".attn.masked_bias")  # the causal mask, which some versions keep as buffers

Parts = dict[str, dict[str, StreamedTensor]]  # weights or moments -> key -> tensor
Moments = dict[str, dict[str, Tensor]]  # EXP_AVG or EXP_AVG_SQ -> parameter -> tensor, as in the file


@dataclass(frozen=True)
class ForeignCheckpoint:
    """What another program's checkpoint is here."""

    state: TrainingState
    shapes: dict[str, list[int]]  # of our parameters, by canonical name
    parts: Parts
    config: Config
    notes: list[str]  # what a person should know of the translation


def load_pickled_tensors(path: Path, expected: str) -> dict[Any, Any]:
    """The dict that ``torch.save`` wrote, its tensors mapped. Only tensors and plain values are made, nothing runs.

    Args:
        expected: what the file should be, for the error.

    Raises:
        CheckpointError: it is no such file, is damaged, or wants code to be run.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # Files from before torch 1.6 are no archives and cannot be mapped.
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # a damaged pickle fails in any way
        if isinstance(error, UnpicklingError) and (culprit := re.search(r"GLOBAL (\S+)", str(error))):
            raise CheckpointError(
                f"{path}: holds {culprit[1]}, and only tensors and plain values are loaded: all else could run code; "
                f"expected {expected}"
            ) from None
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(
            f"{path}: cannot be read as a file of torch.save ({reason}); expected a checkpoint folder, a run folder, "
            f"or {expected}"
        ) from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: holds no dict; expected {expected}")
    return content


def canonical_keys(where: str, keys: Iterable[Any]) -> dict[str, Any]:
    """Parameters' canonical names -> keys of a file, without prefixes and masks.

    Raises:
        CheckpointError: a parameter stands twice.
    """
    found: dict[str, Any] = {}
    for key in keys:
        name = str(key).removeprefix(_COMPILED_PREFIX).removeprefix(_PREFIX)
        if name in found:
            raise CheckpointError(f"{where}: {key!r} stands twice, with and without a prefix")
        if not name.endswith(_MASK_SUFFIXES):
            found[name] = key
    return found


def without_head(where: str, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The parameters with the tied weight once.

    Raises:
        CheckpointError: the output layer is another tensor than the embedding.
    """
    head = weights.get("lm_head.weight")
    if head is not None and not _are_same(head, weights.get("wte.weight", head)):
        raise CheckpointError(
            f"{where}: 'lm_head.weight' differs from '{_PREFIX}wte.weight'; GPT-2 has one weight for both"
        )
    return {name: weight for name, weight in weights.items() if name != "lm_head.weight"}


def _are_same(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors are one, or equal; NaN equals nothing."""
    return (first.data_ptr(), first.shape) == (second.data_ptr(), second.shape) or torch.equal(first, second)


def expect_floats(what: str, tensor: Tensor) -> Tensor:
    """The tensor, which must be one of floats in memory.

    Raises:
        CheckpointError: it is not.
    """
    if not tensor.is_floating_point() or tensor.layout != torch.strided or tensor.device.type != "cpu":
        raise CheckpointError(
            f"{what} is {tensor.dtype}, {tensor.layout} on {tensor.device}; expected floats in memory"
        )
    return tensor.detach()


def expect_shapes(where: str, asked_by: str, weights: Mapping[str, Tensor], expected: dict[str, list[int]]) -> None:
    """All parameters must be there, no others, in these shapes.

    Args:
        asked_by: where the sizes stand that ask for these shapes.

    Raises:
        CheckpointError: names the first that is not.
    """
    for name in [*expected, *weights]:
        key = f"{where}: '{_PREFIX}{name}'"
        if name not in weights:
            raise CheckpointError(f"{key} is missing; {asked_by} ask for it")
        if name not in expected:
            raise CheckpointError(f"{key} has no place in the GPT-2 of {asked_by}")
        if list(weights[name].shape) != expected[name]:
            raise CheckpointError(f"{key} has shape {list(weights[name].shape)}, expected {expected[name]}")


def model_shapes(config: ModelConfig) -> dict[str, list[int]]:
    """Shapes of our parameters, padding rows included, by canonical name."""
    return {name: list(p.shape) for name, p in allocate_model(config, "meta").named_parameters()}


def preset_of(sizes: dict[str, int]) -> dict[str, str]:
    """The key ``preset`` of a model section with these sizes; empty where none has them."""
    preset = next((name for name, preset_sizes in MODEL_PRESETS.items() if preset_sizes == sizes), None)
    return {"preset": preset} if preset else {}


def streamed_parts(shapes: dict[str, list[int]], weights: Mapping[str, Tensor], moments: Moments) -> Parts:
    """What a single rank would have written; what the file lacks is zero. Nothing is read or copied yet."""
    return {
        "weights": {piece_key(WEIGHT, name, None): _streamed(weights.get(name), shapes[name]) for name in shapes},
        "moments": {
            piece_key(kind, name, None): _streamed(moments.get(kind, {}).get(name), shapes[name])
            for kind in (EXP_AVG, EXP_AVG_SQ)
            for name in shapes
        },
    }


def _streamed(tensor: Tensor | None, shape: list[int]) -> StreamedTensor:
    return StreamedTensor(shape, torch.float32, lambda: [_filled(tensor, shape)])


def _filled(tensor: Tensor | None, shape: list[int]) -> Tensor:
    """With rows of zeros for those that the file lacks."""
    if tensor is not None and list(tensor.shape) == shape:
        return tensor
    filled = torch.zeros(shape)
    if tensor is not None:
        filled[: tensor.shape[0]] = tensor
    return filled
