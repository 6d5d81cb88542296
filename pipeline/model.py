"""GPT-2 as published (Radford et al. 2019), with GPT-2's own names. It knows no backend.

Shapes: B sequences, T tokens, C = n_embd, H heads, V = vocabulary of the tokenizer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint, noop_context_fn

from pipeline.config import ModelConfig
from pipeline.seeds import derive_seed

IGNORE_INDEX = -100  # a target that is not scored; torch's own default
VOCAB_MULTIPLE = 128  # matrix products are faster on round sizes: 50257 becomes 50304
INIT_STD = 0.02
LAYER_NORM_EPS = 1e-5


def padded_vocab_size(vocab_size: int) -> int:
    """Rows of the embedding: the vocabulary rounded up. The surplus never enters the softmax."""
    return -(-vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE


class CausalSelfAttention(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.n_head = config.n_head
        self.dropout = config.dropout
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.shape
        q, k, v = self.c_attn(x).split(C, dim=2)
        q, k, v = (t.view(B, T, self.n_head, C // self.n_head).transpose(1, 2) for t in (q, k, v))  # (B, H, T, C/H)
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)  # (B, H, T, C/H)
        y = self.c_proj(y.transpose(1, 2).reshape(B, T, C))
        return F.dropout(y, self.dropout, self.training)


class MLP(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.dropout = config.dropout
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x: Tensor) -> Tensor:
        x = self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))
        return F.dropout(x, self.dropout, self.training)


class Block(nn.Module):
    """Pre-LayerNorm: the residual stream itself is never normalised."""

    def __init__(self, config: ModelConfig, *, recompute: bool) -> None:
        super().__init__()
        self.recompute = recompute
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=LAYER_NORM_EPS)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=LAYER_NORM_EPS)
        self.mlp = MLP(config)

    def forward(self, x: Tensor) -> Tensor:
        if self.recompute and torch.is_grad_enabled():
            if torch.compiler.is_compiling():  # which has both passes in one graph
                return checkpoint(self._residual_branches, x, use_reentrant=False)
            return checkpoint(self._residual_branches, x, use_reentrant=False, context_fn=self._contexts_of_passes())
        return self._residual_branches(x)

    def _contexts_of_passes(self) -> Callable[[], tuple[AbstractContextManager[None], AbstractContextManager[None]]]:
        """Around the first pass and the second: what a caller puts in place of the parameters is there in both.

        ``functional_call`` puts the parameters back before the backward pass.
        """
        stand_ins = {name: weight for name, weight in self.named_parameters() if not isinstance(weight, nn.Parameter)}
        if not stand_ins:
            return noop_context_fn
        return lambda: (nullcontext(), self._standing_in(stand_ins))

    @contextmanager
    def _standing_in(self, weights: Mapping[str, Tensor]) -> Iterator[None]:
        parameters = dict(self.named_parameters())
        self._put(weights)
        try:
            yield
        finally:
            self._put(parameters)

    def _put(self, weights: Mapping[str, Tensor]) -> None:
        for name, weight in weights.items():
            owner, _, leaf = name.rpartition(".")
            self.get_submodule(owner)._parameters[leaf] = weight  # type: ignore[assignment]

    def _residual_branches(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class GPT2(nn.Module):
    """The language model; ``lm_head.weight`` is ``wte.weight``, one parameter under the name ``wte.weight``."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        rows = padded_vocab_size(config.vocab_size)
        self.wte = nn.Embedding(rows, config.n_embd)
        self.wpe = nn.Embedding(config.context_length, config.n_embd)
        self.h = nn.ModuleList(Block(config, recompute=config.recomputes_block(i)) for i in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, eps=LAYER_NORM_EPS)
        self.lm_head = nn.Linear(config.n_embd, rows, bias=False)
        self.lm_head.weight = self.wte.weight

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> Tensor:
        """Logits, or the summed cross-entropy when targets are given.

        Args:
            tokens: (B, T) integer ids below ``vocab_size``.
            targets: (B, T) int64 ids; ``IGNORE_INDEX`` where nothing is scored.

        Returns:
            (B, T, V) logits in the compute dtype, or the fp32 sum over scored targets, in nats. A sum,
            because the mean over a global batch needs the global count of targets.
        """
        logits = self.lm_head(self.hidden_states(tokens))[..., : self.config.vocab_size]  # (B, T, V)
        if targets is None:
            return logits
        losses = F.cross_entropy(
            logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORE_INDEX, reduction="none"
        )
        return losses.sum()  # torch sums pairwise: the error stays at the rounding of one addition

    def hidden_states(self, tokens: Tensor) -> Tensor:
        """The normalised residual stream after the last block, (B, T, C)."""
        x = self.wte(tokens) + self.wpe(self._positions(tokens))  # (B, T, C)
        x = F.dropout(x, self.config.dropout, self.training)
        for block in self.h:
            x = block(x)
        return self.ln_f(x)

    def _positions(self, tokens: Tensor) -> Tensor:
        """Places in the window, (T,); or in the text, (B, T), where positions start at 0 again with each."""
        places = torch.arange(tokens.shape[1], device=tokens.device)
        if self.config.reset_positions_at is None:
            return places
        starts = torch.where(tokens == self.config.reset_positions_at, places, 0).cummax(dim=1).values
        return places - starts

    def assert_tied(self) -> None:
        """The output layer and the embedding must be one tensor after wrapping, stepping and loading."""
        assert self.lm_head.weight is self.wte.weight, "lm_head.weight and wte.weight came apart"


def allocate_model(config: ModelConfig, device: torch.device | str) -> GPT2:
    """An fp32 model whose weights are memory as found: to be initialised or loaded into."""
    with torch.device("meta"):
        model = GPT2(config)
    model.to_empty(device=device)
    model.lm_head.weight = model.wte.weight  # to_empty gives each name a tensor of its own
    return model


def build_model(config: ModelConfig, seed: int) -> GPT2:
    """An initialised fp32 model on the CPU, the same on every rank and machine for one seed."""
    model = allocate_model(config, "cpu")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            initialise(name, parameter, config, seed)
    return model


def initialise(name: str, parameter: Tensor, config: ModelConfig, seed: int) -> None:
    """Fill one parameter in place. Each draws from a stream of its own, so their order does not matter.

    Weights are normal with deviation 0.02, those that write to the residual stream with
    0.02/sqrt(2 n_layer) (Radford et al. 2019, section 2.3); biases are 0, LayerNorm weights 1.
    """
    if name.endswith("bias"):
        parameter.zero_()
    elif "ln_" in name:
        parameter.fill_(1.0)
    else:
        std = INIT_STD / math.sqrt(2 * config.n_layer) if name.endswith("c_proj.weight") else INIT_STD
        generator = torch.Generator().manual_seed(derive_seed(seed, "weights", name))
        parameter.normal_(0.0, std, generator=generator)
        if name == "wte.weight":
            parameter[config.vocab_size :].zero_()  # padding rows: no input, no gradient, no norm


def parameter_count(config: ModelConfig, *, padded: bool = False) -> int:
    """Parameters with the tied weight counted once; ``padded`` includes the surplus vocabulary rows."""
    C, V = config.n_embd, config.vocab_size
    rows = padded_vocab_size(V) if padded else V
    block = 12 * C * C + 13 * C  # 4 matrices of 3, 1, 4, 4 C*C; their biases; two LayerNorms
    return rows * C + config.context_length * C + config.n_layer * block + 2 * C


def flops_per_token(config: ModelConfig, seq_len: int) -> int:
    """Model FLOPs of one token, forward and backward: 6 N + 12 L C T.

    N leaves out the position embedding, which multiplies nothing; the second term is attention
    (Chowdhery et al. 2022, appendix B). Recomputation is not counted.
    """
    n = parameter_count(config, padded=True) - config.context_length * config.n_embd
    return 6 * n + 12 * config.n_layer * config.n_embd * seq_len
