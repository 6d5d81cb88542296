"""Convert names, shapes and ``config.json`` between our model and GPT-2 in ``transformers``."""

import json
from typing import Any

from data_tools.vocabulary import END_OF_TEXT, GPT2_VOCAB_SIZE
from pipeline.config.schema import ModelConfig
from pipeline.errors import CheckpointError
from pipeline.interop.foreign import TRANSFORMER_PREFIX, model_shapes, preset_of
from pipeline.model.gpt2 import LAYER_NORM_EPS
from pipeline.model.initialisation import INIT_STD
from pipeline.model.parameter_state import TOKEN_EMBEDDING

WEIGHTS_FILE = "model.safetensors"
CONFIG_FILE = "config.json"
GENERATION_CONFIG_FILE = "generation_config.json"

MODEL_TYPE = "gpt2"

_TRANSPOSED_SUFFIXES = ("c_attn.weight", "c_proj.weight", "c_fc.weight")  # weights of Conv1D have shape (in, out)

#: Keys of our model section -> keys of config.json.
SIZE_KEYS = {
    **{key: key for key in ("n_layer", "n_head", "n_embd", "vocab_size")},
    "context_length": "n_positions",
}
_SPECIAL_KEYS = ("bos_token_id", "eos_token_id")
_DROPOUT_KEYS = ("resid_pdrop", "embd_pdrop", "attn_pdrop")

#: Keys of config.json that change what the model computes, with the values of GPT-2.
_GPT2_SETTINGS = {
    "model_type": MODEL_TYPE,
    "activation_function": "gelu_new",
    "layer_norm_epsilon": LAYER_NORM_EPS,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
    "tie_word_embeddings": True,
}


def hugging_face_name(name: str) -> str:
    """Return the name of a parameter in the files of ``GPT2LMHeadModel``."""
    return TRANSFORMER_PREFIX + name


def is_transposed(name: str) -> bool:
    """Return whether ``transformers`` stores the transpose of the parameter ``name``."""
    return name.endswith(_TRANSPOSED_SUFFIXES)


def stored_shapes(config: ModelConfig) -> dict[str, list[int]]:
    """Return the shapes in which ``transformers`` stores the parameters, by canonical name."""
    shapes = {**model_shapes(config), TOKEN_EMBEDDING: [config.vocab_size, config.n_embd]}
    return {name: shape[::-1] if is_transposed(name) else shape for name, shape in shapes.items()}


def to_config_json(config: ModelConfig, dtype: str, end_of_text: int | None) -> dict[str, Any]:
    """Return the content of ``config.json``.

    Args:
        dtype: the name of the stored weights' dtype.
        end_of_text: the token that begins and ends a text, or None if it is not known.
    """
    return {
        "architectures": ["GPT2LMHeadModel"],
        **_GPT2_SETTINGS,
        **{theirs: getattr(config, ours) for ours, theirs in SIZE_KEYS.items()},
        "n_ctx": config.context_length,  # the older name of n_positions, which OpenAI's own files also have
        "n_inner": None,
        "initializer_range": INIT_STD,
        **dict.fromkeys(_DROPOUT_KEYS, config.dropout),
        "reorder_and_upcast_attn": False,
        "use_cache": True,
        **to_generation_json(end_of_text),
        "dtype": dtype,
        "torch_dtype": dtype,  # the name of the key dtype before transformers 4.56
    }


def to_generation_json(end_of_text: int | None) -> dict[str, Any]:
    """Return the content of ``generation_config.json``: the ids of the tokens that begin and end a text."""
    return dict.fromkeys(_SPECIAL_KEYS, end_of_text)


def from_config_json(content: dict[str, Any], where: str, notes: list[str]) -> dict[str, Any]:
    """Convert a ``config.json`` of Hugging Face to the section ``model`` of a run config.

    Messages for the user are appended to ``notes``.

    Raises:
        CheckpointError: the model is not a GPT-2, or a size is not valid.
    """
    for key, expected in _GPT2_SETTINGS.items():
        # A missing key has GPT-2's value. Only model_type is required.
        found = content.get(key, None if key == "model_type" else expected)
        if key == "activation_function" and found == "gelu_pytorch_tanh":  # the same function as gelu_new
            continue
        if found != expected:
            found, expected = json.dumps(found), json.dumps(expected)
            raise CheckpointError(f"{where}: '{key}' is {found}; GPT-2 has {expected}, which is required")
    sizes = {ours: _positive(content, theirs, where) for ours, theirs in SIZE_KEYS.items()}
    if content.get("n_inner") not in (None, 4 * sizes["n_embd"]):
        raise CheckpointError(
            f"{where}: 'n_inner' is {json.dumps(content['n_inner'])}; GPT-2 has {4 * sizes['n_embd']}, 4 n_embd"
        )
    if sizes["vocab_size"] >= GPT2_VOCAB_SIZE:
        _note_special_tokens(content, notes)
    if content.get("reorder_and_upcast_attn"):
        notes.append("attention: scores in fp32 there (reorder_and_upcast_attn), in the dtype of run.precision here")
    return {**preset_of(sizes), **sizes, "dropout": _dropout(content, notes)}


def _note_special_tokens(content: dict[str, Any], notes: list[str]) -> None:
    ids = {key: content[key] for key in _SPECIAL_KEYS if content.get(key) not in (None, END_OF_TEXT)}
    if ids:
        given = ", ".join(f"{key} {value}" for key, value in ids.items())
        notes.append(f"end of text: {given} there, always {END_OF_TEXT} here")


def _positive(content: dict[str, Any], key: str, where: str) -> int:
    value = content.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise CheckpointError(f"{where}: {key!r} must be a whole number from 1, it is {json.dumps(value)}")
    return value


def _dropout(content: dict[str, Any], notes: list[str]) -> int | float:
    """Return the dropout rate, or 0 if the three rates differ."""
    rates = [content.get(key, 0.0) for key in _DROPOUT_KEYS]
    if len(set(map(str, rates))) > 1 or not isinstance(rates[0], (int, float)):
        notes.append(f"dropout: {', '.join(_DROPOUT_KEYS)} are {rates}, here it is one number; set to 0")
        return 0.0
    if rates[0]:
        notes.append(f"dropout: {rates[0]} in training, as in the folder; model.dropout=0 turns it off")
    return rates[0]
