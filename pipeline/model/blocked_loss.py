"""Compute the output layer and the loss in blocks of the vocabulary.

All logits together would be the largest tensor of a training step. A block fits into the caches of a CPU. The forward
pass computes two values per row: the largest logit and the sum of exponentials (Milakov and Gimelshein 2018). The
backward pass computes each block's logits again, or reads the logits that the forward pass has kept.
"""

import time
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor

BLOCK_COLUMNS = 3200  # the largest number of tokens of the vocabulary in a block

MEASURED_ROWS, MEASURED_BLOCKS, ROUNDS = 1024, 4, 2  # of ``measure_kept_blocks``

_Step = Callable[..., Any]


def blocked_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, vocab_size: int, ignored: int, *, keep: bool = False
) -> Tensor:
    """Return the cross-entropy of each target in nats, fp32 of shape (N,). The logits are ``hidden @ weight.T``.

    Args:
        hidden: shape (N, C).
        weight: shape (padded vocabulary size, C), in the dtype of ``hidden``. Rows from ``vocab_size`` on are padding.
        targets: (N,) int64 ids.
        ignored: the value of a target that is not scored. Its cross-entropy is 0.
        keep: whether the logits stay in memory until the backward pass. If False, it computes them again.
    """
    losses: Tensor = _BlockedCrossEntropy.apply(  # type: ignore[no-untyped-call]
        hidden, weight, torch.where(targets == ignored, -1, targets), vocab_size, keep
    )
    return losses


def block_columns(padded_vocab_size: int) -> int:
    """Return the number of vocabulary entries per block. The last block may have fewer."""
    blocks = -(-padded_vocab_size // BLOCK_COLUMNS)
    return -(-padded_vocab_size // (8 * blocks)) * 8


def bytes_of_a_block(rows: int, padded_vocab_size: int, logit_bytes: int) -> int:
    """Return how many bytes a backward pass without torch.compile needs for one block of the vocabulary.

    Args:
        rows: the number of targets.
    """
    softmax, is_target, one_hot = 4, 1, 4  # bytes per logit
    return rows * block_columns(padded_vocab_size) * (logit_bytes + softmax + is_target + one_hot)


@torch.no_grad()
def measure_kept_blocks(rows: int, width: int, padded_vocab_size: int, dtype: torch.dtype) -> tuple[float, float]:
    """Measure matrix products of the output layer on a CPU: of the whole vocabulary, and in blocks that are kept.

    The products are those of the logits and of the weight's gradient, for some rows and some of the vocabulary. The
    measurement ends early if the blocks are not faster in one round.

    Args:
        rows: the number of targets in a micro-batch.
        width: the number of columns of the hidden states.

    Returns:
        The seconds for the whole vocabulary, and the seconds in blocks.
    """
    rows = min(rows, MEASURED_ROWS)
    vocab_size = min(padded_vocab_size, MEASURED_BLOCKS * block_columns(padded_vocab_size))
    hidden, weight = torch.ones(rows, width, dtype=dtype), torch.ones(vocab_size, width, dtype=dtype)
    memory, grad_weight = hidden.new_zeros(rows * vocab_size), torch.zeros_like(weight)

    def whole() -> None:
        logits = torch.mm(hidden, weight.t(), out=memory.view(rows, vocab_size))
        torch.mm(logits.t(), hidden, out=grad_weight)

    def in_blocks() -> None:
        transposed = hidden.t().contiguous()
        for block, logits in _blocks_of_logits(hidden, weight, vocab_size, memory):
            grad_weight[block] = torch.mm(transposed, logits).t()

    rounds = []
    for _ in range(1 + ROUNDS):
        rounds.append((_seconds(whole), _seconds(in_blocks)))
        whole_s, blocks_s = rounds[-1]
        if blocks_s >= whole_s:
            return whole_s, blocks_s
    return min(whole_s for whole_s, _ in rounds[1:]), min(blocks_s for _, blocks_s in rounds[1:])  # the first warms up


def _seconds(products: Callable[[], None]) -> float:
    start = time.perf_counter()
    products()
    return time.perf_counter() - start


class _BlockedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, vocab_size: int, keep: bool) -> Tensor:
        ctx.compiles = torch.compiler.is_compiling()
        ctx.vocab_size = vocab_size
        losses, log_totals, kept = LOSSES(hidden, weight, targets, vocab_size, keep, ctx.compiles)
        ctx.save_for_backward(hidden, weight, targets, log_totals, kept)
        return losses

    @staticmethod
    def backward(ctx: Any, grad_losses: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        grad_hidden, grad_weight = GRADIENTS(grad_losses, *ctx.saved_tensors, ctx.vocab_size, ctx.compiles)
        return grad_hidden, grad_weight, None, None, None


def compute_losses(
    hidden: Tensor, weight: Tensor, targets: Tensor, vocab_size: int, keep: bool, compiles: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the loss of each row, the log-sum-exp of its logits, and the kept logits.

    The first two are fp32 of shape (N,). The third is a flat tensor with the logits of one block after the other. It is
    empty if ``keep`` is False.

    Args:
        targets: (N,) int64 ids. A target of -1 is not scored: its loss is 0.
    """
    add_block = _compiled(_add_block) if compiles else _add_block
    largest = hidden.new_full(hidden.shape[:1], torch.finfo(torch.float32).min, dtype=torch.float32)
    total, chosen = torch.zeros_like(largest), torch.zeros_like(largest)
    memory = _memory_for_logits(hidden, weight, keep)
    for block, logits in _blocks_of_logits(hidden, weight, vocab_size, memory):
        largest, total, chosen = add_block(logits, targets - block.start, largest, total, chosen)
    log_totals = largest + total.log()
    return torch.where(targets >= 0, log_totals - chosen, 0.0), log_totals, memory if keep else memory.new_empty(0)


def compute_gradients(
    grad_losses: Tensor,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    log_totals: Tensor,
    kept: Tensor,
    vocab_size: int,
    compiles: bool,
) -> tuple[Tensor, Tensor]:
    """Return the gradients of ``hidden`` and ``weight``, in their dtype. Sums over vocabulary blocks are in fp32.

    Args:
        log_totals: the second result of ``compute_losses``.
        kept: the third result of ``compute_losses``.
    """
    gradient_of = _compiled(_gradient_of) if compiles else _gradient_of
    factors = torch.where(targets >= 0, grad_losses, 0.0)
    grad_hidden = torch.zeros_like(hidden, dtype=torch.float32)
    grad_weight = torch.empty_like(weight)
    summand = torch.empty_like(hidden)
    # On a CPU with AMX, this is twice as fast as the product of the transposed logits and the hidden states.
    transposed = hidden.t().contiguous()
    is_kept = kept.numel() > 0
    memory = kept if is_kept else _memory_for_logits(hidden, weight, keep=False)
    for block, logits in _blocks_of_logits(hidden, weight, vocab_size, memory, is_filled=is_kept):
        gradient = gradient_of(logits, targets - block.start, log_totals, factors)
        grad_weight[block] = torch.mm(transposed, gradient).t()
        grad_hidden += torch.mm(gradient, weight[block], out=summand)
        del gradient  # otherwise, the next block would need memory for two
    return grad_hidden.to(hidden.dtype), grad_weight


def _memory_for_logits(hidden: Tensor, weight: Tensor, keep: bool) -> Tensor:
    tokens = weight.shape[0]
    return hidden.new_empty(hidden.shape[0] * (tokens if keep else block_columns(tokens)))


def _blocks_of_logits(
    hidden: Tensor, weight: Tensor, vocab_size: int, memory: Tensor, *, is_filled: bool = False
) -> Iterator[tuple[slice, Tensor]]:
    """Yield each block of the vocabulary with its logits, shape (N, tokens of the block). Padding has logits of -inf.

    Args:
        memory: a flat tensor for the logits of all blocks. If it is smaller, the logits of a block are only valid until
            the next block.
        is_filled: whether ``memory`` already contains the logits.
    """
    rows, tokens, columns = hidden.shape[0], weight.shape[0], block_columns(weight.shape[0])
    for start in range(0, tokens, columns):
        block = slice(start, min(start + columns, tokens))
        width = block.stop - start
        offset = rows * start if memory.numel() == rows * tokens else 0
        logits = memory[offset : offset + rows * width].view(rows, width)
        if not is_filled:
            torch.mm(hidden, weight[block].t(), out=logits)
            logits[:, max(vocab_size - start, 0) :] = -torch.inf
        yield block, logits


def _add_block(
    logits: Tensor, columns: Tensor, largest: Tensor, total: Tensor, chosen: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Update each row's largest logit, sum of exponentials and target logit with a block. Return the new values.

    The exponentials are relative to the largest logit.

    Args:
        columns: (N,) int64, the target's column in this block. Targets in other blocks have columns outside this block.
    """
    higher = torch.maximum(largest, logits.amax(dim=1).float())
    total = total * (largest - higher).exp() + (logits - higher.unsqueeze(1)).exp_().sum(dim=1)
    is_here = (columns >= 0) & (columns < logits.shape[1])
    here = logits.gather(1, columns.clamp(0, logits.shape[1] - 1).unsqueeze(1)).squeeze(1)
    return higher, total, torch.where(is_here, here.float(), chosen)


def _gradient_of(logits: Tensor, columns: Tensor, log_totals: Tensor, factors: Tensor) -> Tensor:
    """Return the gradient of a block of logits. ``factors`` contains the gradients of the losses, (N,)."""
    softmax = (logits - log_totals.unsqueeze(1)).exp_()  # fp32
    ids = torch.arange(logits.shape[1], device=logits.device, dtype=torch.int32)
    softmax.sub_((ids == columns.int().unsqueeze(1)).float())
    return softmax.mul_(factors.unsqueeze(1)).to(logits.dtype)


@cache
def _compiled(step: _Step) -> _Step:
    return torch.compile(step, dynamic=False)


#: torch.compile does not trace into operators.
_losses = torch.library.custom_op("gpt2_pipeline::blocked_losses", compute_losses, mutates_args=())
_gradients = torch.library.custom_op("gpt2_pipeline::blocked_loss_gradients", compute_gradients, mutates_args=())
LOSSES = torch.ops.gpt2_pipeline.blocked_losses.default
GRADIENTS = torch.ops.gpt2_pipeline.blocked_loss_gradients.default


@_losses.register_fake
def _(
    hidden: Tensor, weight: Tensor, targets: Tensor, vocab_size: int, keep: bool, compiles: bool
) -> tuple[Tensor, Tensor, Tensor]:
    per_target = torch.empty_like(targets, dtype=torch.float32)
    return per_target, torch.empty_like(per_target), hidden.new_empty(hidden.shape[0] * weight.shape[0] if keep else 0)


@_gradients.register_fake
def _(grad_losses: Tensor, hidden: Tensor, weight: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(hidden), torch.empty_like(weight)
