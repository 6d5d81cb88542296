"""Read a GPT-2 from the files of another program, and check its parameters."""

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
from torch.serialization import safe_globals

from data_tools.errors import list_names
from data_tools.shards.manifest import TokenizerRecord
from data_tools.storage.content import describe_content
from pipeline.checkpoint.finite import describe_not_finite
from pipeline.checkpoint.saving import SavedCheckpoint
from pipeline.config.schema import MODEL_PRESETS, ModelConfig
from pipeline.errors import CheckpointError
from pipeline.model.gpt2 import allocate_model
from pipeline.model.output_layer import padded_vocab_size
from pipeline.model.parameter_state import POSITION_EMBEDDING, TOKEN_EMBEDDING

#: The prefix of GPT-2's parameters in a model with an output layer, in nanoGPT and in transformers.
TRANSFORMER_PREFIX = "transformer."

#: The prefixes that wrappers add: torch.compile, DDP, and modules that contain the model as an attribute.
_WRAPPER_PREFIXES = ("_orig_mod.", "module.", "_module.", "model.")
_MASK_SUFFIXES = (".attn.bias", ".attn.masked_bias")  # buffers with the causal mask, which some versions store
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_SETTINGS_CLASS = ".GPTConfig"  # the class name in nanoGPT and build-nanogpt


@dataclass(frozen=True)
class ForeignModel:
    """A GPT-2 from the files of another program. Tensors are memory-mapped if the file format allows this."""

    config: ModelConfig
    weights: dict[str, Tensor]  # canonical name -> tensor in our orientation; no padding rows, biases may be missing
    notes: list[str]  # messages for the user, one per difference to the model in the files
    tokenizer: TokenizerRecord | None = None  # set if the files have another tokenizer than GPT-2's

    def copy_elements(self, name: str, start: int, target: Tensor) -> None:
        """Copy a range of a flattened parameter into ``target``, a tensor of shape (n,) on any device.

        The range begins at element ``start``. Elements that the file lacks, such as padding rows, become zero.
        """
        stored = self.weights.get(name)
        available = 0 if stored is None else min(len(target), max(0, stored.numel() - start))
        if stored is not None and available:
            row = stored[0].numel()
            first, last = start // row, -(-(start + available) // row)
            target[:available].copy_(stored[first:last].reshape(-1)[start - first * row :][:available])
        target[available:].zero_()


@dataclass(frozen=True)
class Conversion:
    saved: SavedCheckpoint
    notes: list[str]  # messages for the user

    def __str__(self) -> str:
        return "\n".join([str(self.saved), *self.notes])


class SettingsObject:
    """The settings of a pickled ``GPTConfig`` of nanoGPT, as attributes.

    The unpickler creates this object, so that no code in the file is executed.
    """


def load_pickled_tensors(path: Path, expected: str) -> dict[Any, Any]:
    """Load a dict from a file of ``torch.save``. The tensors are memory-mapped. No code in the file is executed.

    Each ``GPTConfig`` of nanoGPT becomes a ``SettingsObject``.

    Raises:
        CheckpointError: the file is damaged, or is not a dict of tensors and plain values.
    """
    try:
        content = _load_pickle(path, [], expected)
    except UnpicklingError as error:
        culprit = re.search(r"GLOBAL (\S+)", str(error))
        raise CheckpointError(
            f"{path}: holds {culprit[1] if culprit else 'objects'}, and only tensors and plain values are loaded, "
            f"because anything else could run code; expected {expected}"
        ) from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: does not hold a dict; expected {expected}")
    return content


def _load_pickle(path: Path, classes: list[str], expected: str) -> Any:
    """Load a pickle of tensors and plain values. Objects of ``classes`` become ``SettingsObject``s.

    Raises:
        UnpicklingError: the file contains an object of another class. The message contains ``GLOBAL CLASS``.
    """
    try:
        with warnings.catch_warnings(), safe_globals([(SettingsObject, name) for name in classes]):
            warnings.simplefilter("ignore")
            # Files that torch wrote before version 1.6 are not archives and cannot be memory-mapped.
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # a damaged pickle can raise any exception
        name = re.search(r"GLOBAL (\S+)", str(error)) if isinstance(error, UnpicklingError) else None
        if name and name[1].endswith(_SETTINGS_CLASS) and name[1] not in classes:
            return _load_pickle(path, [*classes, name[1]], expected)
        if name:
            raise
        found = describe_content(path, "zip") or "is damaged, or not a file of torch.save"
        raise CheckpointError(f"{path}: {found}; expected {expected}") from error


def read_named_weights(where: str, state_dict: Mapping[Any, Any]) -> dict[str, Tensor]:
    """Return the parameters of a state dict by canonical name, without attention masks.

    The output layer is left out, because it shares the weight of the embedding.

    Raises:
        CheckpointError: a value is not a tensor of finite floats, a parameter is stored twice, or the weights are not
            those of a GPT-2.
    """
    weights: dict[str, Tensor] = {}
    for key, value in state_dict.items():
        name = canonical_name(str(key))
        if name in weights:
            raise CheckpointError(f"{where}: {key!r} is stored twice, with and without a prefix")
        if name.endswith(_MASK_SUFFIXES):
            _require_causal(f"{where}: {key!r}", value)
        else:
            weights[name] = require_finite_floats(f"{where}: {key!r}", value)
    embedding = TRANSFORMER_PREFIX + TOKEN_EMBEDDING
    if TOKEN_EMBEDDING not in weights:
        raise CheckpointError(f"{where}: holds no '{embedding}', the embedding of a GPT-2; {list_keys(state_dict)}")
    head = weights.pop("lm_head.weight", None)
    if head is not None and not (
        head.dtype == weights[TOKEN_EMBEDDING].dtype and torch.equal(head, weights[TOKEN_EMBEDDING])
    ):
        raise CheckpointError(f"{where}: 'lm_head.weight' differs from '{embedding}'; GPT-2 has one weight for both")
    return weights


def canonical_name(key: str) -> str:
    """Return the canonical name of a parameter, without prefixes of ``transformers`` and of wrappers such as DDP."""
    while prefix := next(filter(key.startswith, _WRAPPER_PREFIXES), None):
        key = key.removeprefix(prefix)
    return key.removeprefix(TRANSFORMER_PREFIX)


def list_keys(content: Mapping[Any, Any]) -> str:
    return f"its keys are {list_names(repr(str(key)) for key in content)}" if content else "it is empty"


def _require_causal(what: str, mask: Any) -> None:
    """Raise CheckpointError if a stored attention mask is not causal."""
    if isinstance(mask, Tensor) and mask.ndim == 4 and mask.layout == torch.strided and mask.device.type == "cpu":
        causal = torch.ones(mask.shape[-2:], dtype=torch.bool).tril()
        if not torch.equal(mask.bool(), causal.expand(mask.shape)):
            raise CheckpointError(f"{what}: is not the mask of causal attention, which GPT-2 has")


def require_finite_floats(what: str, value: Any) -> Tensor:
    """Return a value as a detached tensor.

    Raises:
        CheckpointError: the value is not a dense CPU tensor of 16-bit to 64-bit floats, or an element is not finite.
    """
    if not isinstance(value, Tensor):
        raise CheckpointError(f"{what} must be Tensor, found {type(value).__name__}")
    if value.dtype not in _DTYPES or value.layout != torch.strided or value.device.type != "cpu":
        raise CheckpointError(f"{what} is {value.dtype}, {value.layout} on {value.device}; expected floats in memory")
    if problem := describe_not_finite(value.detach()):
        raise CheckpointError(f"{what}: {problem}; the training that wrote it has diverged, import an earlier file")
    return value.detach()


def require_sizes(where: str, weights: Mapping[str, Tensor], sizes: Mapping[str, int], keys: Mapping[str, str]) -> None:
    """Raise CheckpointError if a file contains model sizes that contradict the weights in the file.

    Call this function before you create a model with these sizes.

    Args:
        sizes: maps names in ``ModelConfig``, such as ``n_embd``, to the sizes in the file.
        keys: maps each name in ``sizes`` to the key under which the file stores this size.
    """
    width = sizes["n_embd"]
    for name, key in ((TOKEN_EMBEDDING, "vocab_size"), (POSITION_EMBEDDING, "context_length")):
        rows = sizes[key]
        if name in weights and weights[name].shape != (rows, width):
            raise CheckpointError(
                f"{where}: '{keys[key]}' {rows} and '{keys['n_embd']}' {width} contradict "
                f"'{TRANSFORMER_PREFIX}{name}', which has shape {list(weights[name].shape)}"
            )
    blocks = {name.split(".")[1] for name in weights if name.startswith("h.")}
    if sizes["n_layer"] != len(blocks):
        raise CheckpointError(
            f"{where}: '{keys['n_layer']}' is {sizes['n_layer']}, and the weights have {len(blocks)} blocks"
        )


def require_shapes(where: str, source: str, weights: Mapping[str, Tensor], expected: dict[str, list[int]]) -> None:
    """Raise CheckpointError if ``weights`` does not have exactly the names and shapes in ``expected``."""
    unknown = {name: weights[name] for name in weights if name not in expected}
    for name in [*expected, *weights]:
        key = f"{where}: '{TRANSFORMER_PREFIX}{name}'"
        if name not in weights:
            instead = f"; among names that GPT-2 lacks, {list_keys(unknown)}" if unknown else ""
            raise CheckpointError(f"{key} is missing; {source} requires it{instead}")
        if name not in expected:
            raise CheckpointError(f"{key} does not exist in the GPT-2 of {source}")
        if list(weights[name].shape) != expected[name]:
            raise CheckpointError(f"{key} has shape {list(weights[name].shape)}, expected {expected[name]}")


def model_shapes(config: ModelConfig) -> dict[str, list[int]]:
    """Return the shapes of our model's parameters by canonical name. The embedding includes its padding rows."""
    return {name: list(p.shape) for name, p in allocate_model(config, "meta").named_parameters()}


def require_gpt2(where: str, config: ModelConfig) -> None:
    """Raise CheckpointError if our model is not the published GPT-2, because somebody has changed ``pipeline/model``.

    Call this function before an export, because other programs would compute something else with the weights. It
    compares the names and shapes of the parameters. If you add a setting that changes what the model computes, but not
    its parameters, then also refuse this setting here.
    """
    expected, found = _published_shapes(config), model_shapes(config)
    for name in [*found, *expected]:
        if found.get(name) == expected.get(name):
            continue
        if name not in found:
            problem = f"{name} is missing"
        elif name not in expected:
            problem = f"GPT-2 has no {name}"
        else:
            problem = f"{name} has shape {found[name]}, and GPT-2's has shape {expected[name]}"
        raise CheckpointError(
            f"{where}: the model is not a GPT-2: {problem}; export only models with an unchanged pipeline/model"
        )


def _published_shapes(config: ModelConfig) -> dict[str, list[int]]:
    """Return the shapes of GPT-2's parameters. The embedding includes padding rows."""
    C = config.n_embd
    block = {
        "ln_1": [C],
        "attn.c_attn": [3 * C, C],
        "attn.c_proj": [C, C],
        "ln_2": [C],
        "mlp.c_fc": [4 * C, C],
        "mlp.c_proj": [C, 4 * C],
    }
    layers = {f"h.{i}.{name}": shape for i in range(config.n_layer) for name, shape in block.items()} | {"ln_f": [C]}
    return {
        TOKEN_EMBEDDING: [padded_vocab_size(config.vocab_size), C],
        POSITION_EMBEDDING: [config.context_length, C],
        **{f"{name}.weight": shape for name, shape in layers.items()},
        **{f"{name}.bias": shape[:1] for name, shape in layers.items()},
    }


def preset_of(sizes: dict[str, int]) -> dict[str, str]:
    """Return ``{"preset": name}`` if a preset has exactly these sizes, and {} otherwise."""
    return next(({"preset": name} for name, preset in MODEL_PRESETS.items() if preset.items() <= sizes.items()), {})


def read_padded(
    tensors: Mapping[str, Mapping[str, Tensor]], shapes: dict[str, list[int]], kind: str, name: str
) -> Tensor:
    """Return the tensor ``name`` with the shape ``shapes[name]``. Padding rows and missing tensors are zero.

    Args:
        tensors: maps the kinds ``weight``, ``exp_avg`` and ``exp_avg_sq`` to dicts from canonical names to tensors.
        kind: a key of ``tensors``.
    """
    tensor = tensors.get(kind, {}).get(name)
    if tensor is not None and list(tensor.shape) == shapes[name]:
        return tensor
    padded = torch.zeros(shapes[name])
    if tensor is not None:
        padded[: tensor.shape[0]] = tensor
    return padded
