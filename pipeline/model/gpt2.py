"""Define GPT-2 as published (Radford et al. 2019), with the module names of the original.

In shapes, B is the number of sequences, and T the number of tokens per sequence. C is ``n_embd``, H is the number of
heads, and V is the vocabulary size of the tokenizer.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from pipeline.config.schema import ModelConfig
from pipeline.model.attention import Attend, causal_attention
from pipeline.model.initialisation import draw_elements
from pipeline.model.key_value_cache import KeyValueCache
from pipeline.model.output_layer import Method, OutputLayer, padded_vocab_size

LAYER_NORM_EPS = 1e-5
_GELU_LINEAR = 2 * math.sqrt(2 / math.pi)  # 2u = x (linear + cubic x^2)
_GELU_CUBIC = 0.044715 * _GELU_LINEAR


class CausalSelfAttention(nn.Module):
    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.n_head = config.n_head
        self.dropout = config.dropout
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x: Tensor, attend: Attend | None) -> Tensor:
        B, T, C = x.shape
        q, k, v = self.c_attn(x).split(C, dim=2)
        q, k, v = (t.view(B, T, self.n_head, C // self.n_head).transpose(1, 2) for t in (q, k, v))  # (B, H, T, C/H)
        if attend is None:
            y = causal_attention(q, k, v, self.dropout if self.training else 0.0)  # (B, H, T, C/H)
        else:
            y = attend(self.layer, q, k, v)
        y = self.c_proj(y.transpose(1, 2).reshape(B, T, C))
        return F.dropout(y, self.dropout) if self.training else y


def gelu(x: Tensor) -> Tensor:
    """Return GELU with GPT-2's tanh approximation (Hendrycks and Gimpel 2016).

    The result is x/2 (1 + tanh u), where u = sqrt(2/pi) (x + 0.044715 x^3).
    """
    if torch.compiler.is_compiling():  # x sigmoid(2u) is the same function, and exp is cheaper than tanh
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return (wide * torch.sigmoid(wide * (_GELU_LINEAR + _GELU_CUBIC * wide * wide))).to(x.dtype)
    return F.gelu(x, approximate="tanh")


class GeluLinear(nn.Linear):
    """A linear layer, followed by ``gelu``. In inference on a CPU, ``pipeline.model.packed_linear`` replaces it."""

    activation: Callable[[Tensor], Tensor] = staticmethod(gelu)  # pipeline.interop replaces it

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(super().forward(x))


class MLP(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.dropout = config.dropout
        self.c_fc = GeluLinear(config.n_embd, 4 * config.n_embd)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x: Tensor) -> Tensor:
        x = self.c_proj(self.c_fc(x))
        return F.dropout(x, self.dropout) if self.training else x


class Block(nn.Module):
    """A transformer block with pre-LayerNorm."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=LAYER_NORM_EPS)
        self.attn = CausalSelfAttention(config, layer)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=LAYER_NORM_EPS)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, attend: Attend | None = None) -> Tensor:
        x = x + self.attn(self.ln_1(x), attend)
        return x + self.mlp(self.ln_2(x))


@dataclass(frozen=True)
class ScoringBatch:
    """The input of ``GPT2.score``."""

    tokens: Tensor  # (B, T) int64
    targets: Tensor  # (N,) int64
    outputs: Tensor  # (N,) int64, the token before each target, as an index into the flattened tokens (B * T,)
    positions: Tensor | None = None  # (B, T) int64, each token's position in its text; None if each row is one text
    mask: Tensor | None = None  # (B, 1, T, T) bool, True if query token i attends to key token j; None means causal


class GPT2(nn.Module):
    """The language model. The output layer and the token embedding share one parameter, named ``wte.weight``.

    A new object has no initial values. To create a model with the initial values of training, call ``build_model``.
    """

    __call__: Callable[..., Tensor]

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.wte = _embedding(padded_vocab_size(config.vocab_size), config.n_embd)
        self.wpe = _embedding(config.context_length, config.n_embd)
        self.h = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, eps=LAYER_NORM_EPS)
        self.lm_head = OutputLayer(config.n_embd, config.vocab_size)
        self.tie_weights()

    def forward(self, *inputs: Any, method: Method | None = None) -> Tensor:
        """Call the method ``loss``, ``logits`` or ``score`` with ``inputs``, and return its result.

        If ``method`` is None, ``model(tokens, targets)`` returns the loss, and ``model(tokens)`` returns the logits.

        Do not call these methods of a wrapped model directly. DDP, FSDP2, DeepSpeed, autocast and torch.compile work
        only in ``forward``.
        """
        method = method or ("logits" if len(inputs) == 1 else "loss")
        result: Tensor = getattr(self, method)(*inputs)
        return result

    def loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Return the sum of the cross-entropies of all targets in nats, an fp32 scalar.

        Args:
            tokens: (B, T) integer ids below ``vocab_size``.
            targets: (B, T) int64 ids. Targets that are ``IGNORE_INDEX`` do not count.
        """
        return self.lm_head(self.hidden_states(tokens), targets, method="loss")

    def logits(self, tokens: Tensor) -> Tensor:
        """Return the logits, shape (B, T, V), in the compute dtype."""
        return self.lm_head(self.hidden_states(tokens), method="logits")

    def score(self, batch: ScoringBatch) -> Tensor:
        """Return each target's log-probability in nats, and its rank among all tokens, fp32 of shape (2, N).

        The most likely token has rank 0.
        """
        hidden = self.hidden_states(
            batch.tokens,
            batch.positions,
            None if batch.mask is None else lambda layer, q, k, v: F.scaled_dot_product_attention(q, k, v, batch.mask),
        )
        return self.lm_head(hidden.flatten(0, 1)[batch.outputs], batch.targets, method="score")

    def prefill(self, tokens: Tensor, lengths: Tensor, cache: KeyValueCache) -> Tensor:
        """Store whole rows in the cache. Return the logits for the next token of each row, shape (B, V).

        Args:
            tokens: (B, T) integer ids, padded on the right.
            lengths: (B, 1) int64, the number of tokens per row, without padding.
            cache: its first B rows are overwritten.
        """
        last = lengths - 1
        positions = self._positions(tokens).expand(tokens.shape)
        cache.text_starts(len(tokens)).copy_(last - positions.gather(1, last))
        x = self.hidden_states(tokens, positions, cache.attend_to_rows)  # (B, T, C)
        return self.lm_head(x[torch.arange(len(x), device=x.device), last[:, 0]], method="logits")

    def decode(self, tokens: Tensor, slots: Tensor, seen: int, cache: KeyValueCache) -> Tensor:
        """Add one token to each row of the cache. Return the logits for the row's next token, shape (B, V).

        The shapes of all tensors depend only on B and ``seen``, and all values stay on the device. The method can
        therefore be captured as a CUDA graph. Repeated calls with the same arguments give the same result.

        Args:
            tokens: (B, 1) integer ids.
            slots: (B, 1) int64, the number of earlier tokens per row.
            seen: the number of slots that attention reads. It is larger than all ``slots``.
            cache: the cache with all earlier tokens.
        """
        positions = slots
        if self.config.reset_positions_at is not None:
            starts = cache.text_starts(len(tokens))
            starts.copy_(torch.where(tokens == self.config.reset_positions_at, slots, starts))
            # A row of the cache that no text uses can have an old start after its slot.
            positions = (slots - starts).clamp(min=0)
        x = self.hidden_states(tokens, positions, cache.attend_to_slots(slots, seen))  # (B, 1, C)
        return self.lm_head(x[:, 0], method="logits")

    def hidden_states(self, tokens: Tensor, positions: Tensor | None = None, attend: Attend | None = None) -> Tensor:
        """Return the hidden states after the last block and the last LayerNorm, shape (B, T, C).

        Args:
            tokens: (B, T) integer ids below ``vocab_size``.
            positions: (B, T) int64. If None, positions are computed from the tokens.
            attend: the attention function. If None, causal attention within each row is used.
        """
        x = self.wte(tokens) + self.wpe(self._positions(tokens) if positions is None else positions)  # (B, T, C)
        if self.training:
            x = F.dropout(x, self.config.dropout)
        for block in self.h:
            x = block(x, attend)
        return self.ln_f(x)

    def _positions(self, tokens: Tensor) -> Tensor:
        """Return each token's position in its row, shape (T,) or (B, T).

        If ``reset_positions_at`` is set, positions restart at 0 at each token with this id.
        """
        length, longest = tokens.shape[1], self.config.context_length
        assert length <= longest, f"{length} tokens do not fit into the context_length of {longest} tokens"
        positions = torch.arange(length, device=tokens.device)
        if self.config.reset_positions_at is None:
            return positions
        starts = torch.where(tokens == self.config.reset_positions_at, positions, 0).cummax(dim=1).values
        return positions - starts

    def tie_weights(self) -> None:
        """Make the output layer use the weight of the token embedding. Call this after ``nn.Module.to_empty``."""
        self.lm_head.weight = self.wte.weight

    def assert_tied(self) -> None:
        assert self.lm_head.weight is self.wte.weight, "lm_head.weight and wte.weight came apart"


def _embedding(rows: int, width: int) -> nn.Embedding:
    """Return an embedding without initial values.

    On the device ``meta``, torch's own initial values would import its compiler, which takes a second.
    """
    return nn.Embedding(rows, width, _weight=torch.empty(rows, width))


def allocate_model(config: ModelConfig, device: torch.device | str) -> GPT2:
    """Return an fp32 model with uninitialized weights. On the device ``meta``, the weights have no memory."""
    with torch.device("meta"):
        model = GPT2(config)
    assert not list(model.buffers()), "a buffer would lose its values here: compute them in forward"
    place_model(model, device)
    return model


def place_model(model: GPT2, device: torch.device | str) -> None:
    """Move the weights to a device. Weights on ``meta`` are allocated on the device, without initial values."""
    if not model.wte.weight.is_meta:
        model.to(device)
        return
    # nn.Module.to_empty would import torch's compiler.
    model._apply(lambda weight: torch.empty(weight.shape, dtype=weight.dtype, device=device))  # type: ignore[no-untyped-call]
    model.tie_weights()


def build_model(config: ModelConfig, seed: int) -> GPT2:
    """Return a new fp32 model on the CPU. The same seed gives the same initial weights on every machine."""
    model = allocate_model(config, "cpu")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            draw_elements(name, parameter.shape, config, seed, 0, parameter.view(-1))
    return model


@cache
def parameter_count(config: ModelConfig, *, padded: bool = False) -> int:
    """Return the number of parameters. The weight that the embedding shares with the output layer is counted once.

    Args:
        padded: whether to include the padding rows of the shared weight.
    """
    count = sum(parameter.numel() for parameter in allocate_model(config, "meta").parameters())
    padding = padded_vocab_size(config.vocab_size) - config.vocab_size
    return count if padded else count - padding * config.n_embd


def flops_per_token(config: ModelConfig, seq_len: int) -> int:
    """Return the model FLOPs of the forward and backward pass per token: 6 N + 12 L C T.

    N is the number of parameters without the position embedding. L is ``n_layer``, C is ``n_embd``, and T is
    ``seq_len``. FLOPs of recomputed activations do not count (Chowdhery et al. 2022, appendix B).
    """
    n = parameter_count(config, padded=True) - config.context_length * config.n_embd
    return 6 * n + 12 * config.n_layer * config.n_embd * seq_len
