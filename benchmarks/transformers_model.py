"""Build the GPT-2 of ``transformers`` with our weights, for comparisons."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from data_tools.vocabulary import END_OF_TEXT, GPT2_VOCAB_SIZE
from pipeline.interop.hugging_face.layout import hugging_face_name, is_transposed, to_config_json
from pipeline.model.gpt2 import GPT2


def transformers_model(model: GPT2, **settings: Any) -> Any:
    """Return a ``GPT2LMHeadModel`` with a copy of the weights, in fp32 and in training mode.

    ``settings`` overrides keys of ``GPT2Config``.
    """
    end_of_text = END_OF_TEXT if model.config.vocab_size == GPT2_VOCAB_SIZE else None
    config = GPT2Config(**{**to_config_json(model.config, "float32", end_of_text), **settings})
    theirs: Any = GPT2LMHeadModel(config)
    weights: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        weight = parameter.detach()
        weight = weight[: model.config.vocab_size] if name == "wte.weight" else weight
        weights[hugging_face_name(name)] = weight.T if is_transposed(name) else weight
    weights["lm_head.weight"] = weights[hugging_face_name("wte.weight")]
    theirs.load_state_dict(weights)
    theirs.tie_weights()
    return theirs.float().train()
