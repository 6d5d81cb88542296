"""Compute the activation memory of one micro-batch, by tracing the real model with fake tensors.

Fake tensors have shapes and dtypes, but no memory. One forward and backward pass is run, and the bytes of all live
storages are counted. The fake tensors are on the CPU. A GPU is assumed to need the same tensors.
"""

import weakref
from collections.abc import Container, Iterable, Sequence
from dataclasses import astuple, dataclass, replace
from functools import lru_cache
from typing import Any, Literal

import torch
import torch.nn as nn
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pipeline.config.schema import ModelConfig
from pipeline.model.blocked_loss import GRADIENTS, LOSSES, bytes_of_a_block
from pipeline.model.gpt2 import GPT2
from pipeline.model.output_layer import padded_vocab_size
from pipeline.model.precision import AutocastModel, Bf16ViewModel
from pipeline.model.recomputation import recompute_blocks

#: The weights that a backend computes with: fp32 under autocast, bf16 copies of fp32 weights, or bf16.
Compute = Literal["autocast", "bf16_view", "bf16_weights"]


@dataclass(frozen=True)
class Peak:
    """The peak memory in one interval of a forward and backward pass.

    A new interval begins whenever the backward pass finishes the gradient of a parameter.
    """

    finished_elements: int  # elements of all parameters whose gradients are finished
    activation_bytes: int  # without logits; includes copies of weights and unfinished gradients
    logit_bytes: int  # bytes of the tensors whose last dimension is the vocabulary


@dataclass(frozen=True)
class Request:
    """The model and the micro-batch whose activations are traced.

    ``precision`` is the precision of autocast. It has an effect only if ``compute`` is ``autocast``.
    """

    model: ModelConfig
    compute: Compute
    precision: str
    micro_batch_size: int
    seq_len: int
    loss_in_blocks: bool = False


@lru_cache(maxsize=512)
def trace_activations(request: Request) -> tuple[Peak, ...]:
    """Return the peak memory in each interval (see ``Peak``) of a forward and backward pass, in order.

    For a model with many blocks, the function traces two models with few blocks, and extrapolates their peaks. The
    result then contains only the intervals of the first and last blocks. Intervals between them have no larger peak,
    because memory changes linearly from block to block.
    """
    config = request.model
    period = max(1, int(config.activation_checkpointing))
    depth = 2 * period + config.n_layer % period
    if depth + period >= config.n_layer:
        return _trace(request)
    shallow, deeper = (
        _trace(replace(request, model=config.model_copy(update={"n_layer": layers})))
        for layers in (depth, depth + period)
    )
    return _extrapolate(shallow, deeper, (config.n_layer - depth) // period)


def _extrapolate(shallow: Sequence[Peak], deeper: Sequence[Peak], periods: int) -> tuple[Peak, ...]:
    """Return the peaks of a model, extrapolated from those of two models with fewer blocks.

    A period is a group of blocks that repeats. The model of ``deeper`` has one more period than that of ``shallow``.
    The model of the result has ``periods`` more. The peaks are in the order of the backward pass, so the first half
    belongs to the last blocks.
    """
    half = len(shallow) // 2
    partners = [*deeper[:half], *deeper[half - len(shallow) :]]
    return tuple(
        Peak(*(low + periods * (high - low) for low, high in zip(astuple(peak), astuple(partner), strict=True)))
        for peak, partner in zip(shallow, partners, strict=True)
    )


def _trace(request: Request) -> tuple[Peak, ...]:
    with FakeTensorMode():
        model, compute = _build(request)
        tokens = torch.zeros(request.micro_batch_size, request.seq_len, dtype=torch.int64)
        recorder = _PeakRecorder(request.model.vocab_size, model.wte.weight.shape)
        recorder.ignore([*model.parameters(), tokens])
        for parameter in model.parameters():
            parameter.register_post_accumulate_grad_hook(recorder.finish_gradient)  # type: ignore[no-untyped-call]
        with recorder:
            compute(tokens, tokens, method="loss").backward()
    return tuple(recorder.peaks.values())


def _build(request: Request) -> tuple[GPT2, nn.Module]:
    before = torch.get_default_dtype()
    # Fake parameters cannot be converted, so they are created in their dtype.
    torch.set_default_dtype(torch.bfloat16 if request.compute == "bf16_weights" else torch.float32)
    try:
        model = GPT2(request.model).train()
    finally:
        torch.set_default_dtype(before)
    recompute_blocks(model)
    model.lm_head.loss_in_blocks = request.loss_in_blocks
    if request.compute == "autocast":
        return model, AutocastModel(model, request.precision, torch.device("cpu"))
    return model, Bf16ViewModel(model) if request.compute == "bf16_view" else model


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of all live storages that were allocated inside this dispatch mode.

    The tensors can be fake. Temporary memory inside a kernel is not counted.
    """

    def __init__(self, vocabulary: Container[int] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.total = 0
        self.logits = 0  # the bytes in ``total`` of tensors whose last dimension is in ``vocabulary``
        self._vocabulary = vocabulary
        self._counted: dict[int, tuple[int, int]] = {}  # storage -> its bytes in ``total`` and in ``logits``
        self._ignored: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._count(leaf)
        return result

    def ignore(self, tensors: Iterable[Tensor]) -> None:
        """Stop counting the storages of the given tensors."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            self._forget(storage._cdata)
            self._ignored.add(storage._cdata)
            weakref.finalize(storage, self._ignored.discard, storage._cdata)

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._counted or key in self._ignored:
            return
        size = storage.nbytes()
        logits = size if tensor.dim() > 0 and tensor.shape[-1] in self._vocabulary else 0
        self._counted[key] = size, logits
        self.total += size
        self.logits += logits
        weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        size, logits = self._counted.pop(key, (0, 0))
        self.total -= size
        self.logits -= logits


def _memory_inside(func: Any, args: Any) -> int:
    """Return the bytes of a block of logits if ``func`` computes the loss in blocks, otherwise 0."""
    if func is LOSSES:
        hidden, weight, *_ = args
    elif func is GRADIENTS:
        _, hidden, weight, *_ = args
    else:
        return 0
    return bytes_of_a_block(hidden.shape[0], weight.shape[0], hidden.itemsize)


class _PeakRecorder(LiveBytes):  # type: ignore[no-untyped-call]
    """Records the peak in each interval between two finished gradients."""

    def __init__(self, vocab_size: int, tied_shape: torch.Size) -> None:
        super().__init__(vocabulary={vocab_size, padded_vocab_size(vocab_size)})
        self.peaks: dict[tuple[int, bool], Peak] = {}  # (finished elements, is forward pass) -> peak
        self._tied_shape = tied_shape
        self._finished = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_dispatch__(func, types, args, kwargs)
        if func is torch.ops.aten.add.Tensor and result.shape == self._tied_shape:
            # Autograd sums the two gradients of the tied weight in place, but not under a dispatch mode.
            self._forget(args[0].untyped_storage()._cdata)
        logits = self.logits + _memory_inside(func, args)
        total = self.total - self.logits + logits
        key = (self._finished, torch.is_grad_enabled())
        before = self.peaks.get(key)
        if before is None or total > before.activation_bytes + before.logit_bytes:
            self.peaks[key] = Peak(self._finished, total - logits, logits)
        return result

    def finish_gradient(self, parameter: Tensor) -> None:
        assert parameter.grad is not None
        self.ignore([parameter.grad])
        self._finished += parameter.numel()
