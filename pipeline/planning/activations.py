"""What one micro-batch keeps alive beside weights and gradients, found by running the real model without memory.

The model of :mod:`pipeline.model.gpt2` goes through one forward and backward pass on fake tensors, which have shapes
and dtypes but no memory, and every storage that it makes is counted until it is freed. A change of the model, of its
loss or of its attention is therefore followed without a change here. Fake tensors stand on the CPU: other devices are
taken to keep the same tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

import torch
import torch.nn as nn
from torch import Tensor
from torch._subclasses import FakeTensorMode

from pipeline.config.schema import ModelConfig
from pipeline.model.gpt2 import GPT2, padded_vocab_size
from pipeline.model.precision import AutocastModel, Bf16ViewModel
from pipeline.planning.live_bytes import LiveBytes

#: How a backend computes: fp32 weights under autocast, bf16 copies made of fp32 weights, or weights that are bf16.
Compute = Literal["autocast", "bf16_view", "bf16_weights"]

_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Moment:
    """The most that is alive at once between two finished gradients."""

    finished_elements: int  # of all parameters whose gradients are finished, in the order of the backward pass
    activation_bytes: int  # without logits; with the one gradient that is being computed, and copies of weights
    logit_bytes: int  # whatever has the vocabulary as its last dimension


@dataclass(frozen=True)
class Request:
    """One micro-batch through one model; ``precision`` only matters under autocast."""

    model: ModelConfig
    compute: Compute
    precision: str
    micro_batch_size: int
    seq_len: int


@lru_cache(maxsize=512)
def trace_activations(request: Request) -> tuple[Moment, ...]:
    """The moments of a forward and backward pass, from the first (nothing finished) to the last.

    Blocks are alike, so two models of a few are run, and what the second has more is what every further block adds:
    between the first and the last block all grows in a straight line, and no moment in between exceeds both ends.
    """
    config = request.model
    period = max(1, int(config.activation_checkpointing))
    depth = 2 * period + config.n_layer % period
    if depth + period >= config.n_layer:
        return _run(request)
    shallow, deeper = (
        _run(replace(request, model=config.model_copy(update={"n_layer": layers})))
        for layers in (depth, depth + period)
    )
    return _extrapolated(shallow, deeper, (config.n_layer - depth) // period)


def _extrapolated(shallow: Sequence[Moment], deeper: Sequence[Moment], periods: int) -> tuple[Moment, ...]:
    """The moments of a model with so many more periods of blocks than the shallow one; the deeper has one more.

    The backward pass begins with the last block: the first half of the shallow model's moments belongs to the last
    blocks of any deeper model, the second half to the first ones.
    """
    half = len(shallow) // 2
    partners = [*deeper[:half], *deeper[half - len(shallow) :]]

    def further(value: int, partner: int) -> int:
        return value + periods * (partner - value)

    return tuple(
        Moment(
            further(moment.finished_elements, partner.finished_elements),
            further(moment.activation_bytes, partner.activation_bytes),
            further(moment.logit_bytes, partner.logit_bytes),
        )
        for moment, partner in zip(shallow, partners, strict=True)
    )


def _run(request: Request) -> tuple[Moment, ...]:
    with FakeTensorMode():
        model, compute = _build(request)
        tokens = torch.zeros(request.micro_batch_size, request.seq_len, dtype=torch.int64)
        recorder = _Recorder(request.model.vocab_size, model.wte.weight.shape)
        recorder.live.leave_out([*model.parameters(), tokens])
        for parameter in model.parameters():
            parameter.register_post_accumulate_grad_hook(recorder.finish_gradient)  # type: ignore[no-untyped-call]
        with recorder.live:
            compute(tokens, tokens, method="loss").backward()
    return tuple(recorder.moments.values())


class _Recorder:
    """Keeps the largest moment between two finished gradients."""

    def __init__(self, vocab_size: int, tied_shape: torch.Size) -> None:
        vocabulary = {vocab_size, padded_vocab_size(vocab_size)}
        self.live = LiveBytes(
            self._note,
            is_apart=lambda tensor: tensor.dim() > 0 and tensor.shape[-1] in vocabulary,
            sums_in_place=lambda tensor: tensor.shape == tied_shape,  # the gradients of its two uses
        )
        self.moments: dict[tuple[int, bool], Moment] = {}  # forward and backward pass apart: each grows by itself
        self._finished = 0

    def finish_gradient(self, parameter: Tensor) -> None:
        """From here on the gradient counts as one, and no longer among the activations."""
        assert parameter.grad is not None
        self.live.leave_out([parameter.grad])
        self._finished += parameter.numel()

    def _note(self) -> None:
        key = (self._finished, torch.is_grad_enabled())
        live, before = self.live, self.moments.get(key)
        if before is None or live.total > before.activation_bytes + before.logit_bytes:
            self.moments[key] = Moment(self._finished, live.total - live.apart, live.apart)


def _build(request: Request) -> tuple[GPT2, nn.Module]:
    with _default_dtype(torch.bfloat16 if request.compute == "bf16_weights" else torch.float32):
        model = GPT2(request.model).train()
    builders: dict[Compute, Callable[[], nn.Module]] = {
        "autocast": lambda: AutocastModel(model, request.precision, _CPU),
        "bf16_view": lambda: Bf16ViewModel(model),
        "bf16_weights": lambda: model,
    }
    return model, builders[request.compute]()


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """New parameters in this dtype; fake ones cannot be converted."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
