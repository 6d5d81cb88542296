"""Describe how an imported model differs from the original, and compare their losses on a short text."""

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from data_tools.vocabulary import GPT2_VOCAB_SIZE
from pipeline.config.schema import ModelConfig
from pipeline.interop.foreign import model_shapes, read_padded
from pipeline.model.gpt2 import GPT2, GeluLinear, gelu
from pipeline.model.parameter_state import TOKEN_EMBEDDING, WEIGHT

#: 50257 rounded up to a multiple of 1024. A vocabulary of at most this size is GPT-2's with added tokens or padding.
LARGEST_PADDED_VOCABULARY = 51_200

#: The token ids of "Once upon a time there was a small town by the sea. Every morning the fishermen went out in their
#: boats, and every evening the children waited on the beach to see what they had caught."
SHORT_TEXT = (
    *(7454, 2402, 257, 640, 612, 373, 257, 1402, 3240, 416, 262, 5417, 13, 3887, 3329, 262, 34955, 1816, 503, 287),
    *(511, 16659, 11, 290, 790, 6180, 262, 1751, 13488, 319, 262, 10481, 284, 766, 644, 484, 550, 4978, 13),
)


def rows_of_the_tokenizer(rows: int) -> int:
    """Return how many rows of an embedding belong to tokens of the tokenizer. The embedding has ``rows`` rows.

    Rows after GPT-2's last token do not count. They are padding, or tokens that the other program added.

    An embedding with more than ``LARGEST_PADDED_VOCABULARY`` rows has another tokenizer. In this case, all rows count.
    """
    return GPT2_VOCAB_SIZE if GPT2_VOCAB_SIZE < rows <= LARGEST_PADDED_VOCABULARY else rows


def describe_dtypes(weights: Mapping[str, Tensor]) -> list[str]:
    """Return a list with one line that names the dtypes other than fp32. If there are none, the list is empty."""
    dtypes = sorted({str(weight.dtype).removeprefix("torch.") for weight in weights.values()} - {"float32"})
    if not dtypes:
        return []
    change = "rounded to fp32" if "float64" in dtypes else "stored as fp32 without a change in value"
    return [f"weights: {', '.join(dtypes)} there, {change}"]


def describe_differences(
    config: ModelConfig, weights: Mapping[str, Tensor], kept_rows: int, *, exact_gelu: bool
) -> list[str]:
    """Return one line per difference between the original model and our imported model.

    Each line contains the original model's loss on a short text, with and without this difference.

    Args:
        config: the config of the original model. Its ``vocab_size`` counts all rows of the stored embedding.
        weights: the original model's parameters by canonical name. Weights of linear layers have shape (out, in).
            Biases may be missing.
        kept_rows: the number of rows of the embedding that our model keeps.
        exact_gelu: whether the original model computes GELU with erf. Otherwise, it uses the tanh approximation.
    """
    rows = config.vocab_size
    if not exact_gelu and kept_rows == rows:
        return []
    model = _assemble(config, weights)
    tokens, text = _tokens_for(config)
    _set_activation(model, F.gelu if exact_gelu else gelu)
    there = _loss(model, tokens)
    notes: list[str] = []
    if kept_rows != rows:
        model.lm_head.vocab_size = kept_rows
        notes.append(
            f"vocabulary: {rows} rows there; GPT-2's tokenizer has {kept_rows} tokens, so the last {rows - kept_rows} "
            f"rows are cut; {text} has a loss of {there:.4f} with them and {_loss(model, tokens):.4f} without them"
        )
        model.lm_head.vocab_size = rows
    if exact_gelu:
        _set_activation(model, gelu)
        notes.append(
            "activation: GELU with erf there, as in nanoGPT since June 2023, and its tanh approximation here, as in "
            f"GPT-2; {text} has a loss of {there:.4f} there and {_loss(model, tokens):.4f} here"
        )
    return notes


def _assemble(config: ModelConfig, weights: Mapping[str, Tensor]) -> GPT2:
    """Return a model that computes with the given weights. Tensors in fp32 stay memory-mapped."""
    shapes = model_shapes(config)
    state = {name: read_padded({WEIGHT: weights}, shapes, WEIGHT, name).float() for name in shapes}
    with torch.device("meta"):
        model = GPT2(config)
    model.load_state_dict({**state, "lm_head.weight": state[TOKEN_EMBEDDING]}, assign=True)
    return model.eval()


def _tokens_for(config: ModelConfig) -> tuple[Tensor, str]:
    if config.vocab_size >= GPT2_VOCAB_SIZE:
        ids, text = torch.tensor(SHORT_TEXT), "a short text"
    else:
        generator = torch.Generator().manual_seed(0)
        ids, text = torch.randint(config.vocab_size, (len(SHORT_TEXT),), generator=generator), "a row of random tokens"
    return ids[None, : config.context_length + 1], text


def _set_activation(model: GPT2, activation: Callable[[Tensor], Tensor]) -> None:
    for module in model.modules():
        if isinstance(module, GeluLinear):
            module.activation = activation


@torch.inference_mode()
def _loss(model: GPT2, tokens: Tensor) -> float:
    return float(model.loss(tokens[:, :-1], tokens[:, 1:])) / (tokens.shape[1] - 1)
