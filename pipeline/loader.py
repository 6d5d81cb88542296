"""From token shards to micro-batches: which tokens this rank sees in a step, and in a validation.

A sample is a window of ``seq_len`` inputs and the targets one token further. Windows lie end to end
over the whole split, shard boundaries or not, so the size of the shards does not change the data.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from data_tools.shards import TokenStream
from pipeline.batch_plan import BatchPlan
from pipeline.config import ModelConfig
from pipeline.errors import ConfigError, TrainingError
from pipeline.model import IGNORE_INDEX
from pipeline.sample_order import IndexArray, SampleOrder

#: (starts of windows, seq_len) -> bool (B, T): which targets are scored. None: all.
TargetMask = Callable[[IndexArray, int], npt.NDArray[np.bool_]]


@dataclass(frozen=True)
class MicroBatch:
    """What one rank computes on in one micro-step, in host memory."""

    first_sample: int  # global index; names the dropout stream
    tokens: npt.NDArray[np.uint16]  # (B, T + 1)
    target_mask: npt.NDArray[np.bool_] | None = None  # (B, T), True where the target is scored

    @property
    def scored_targets(self) -> int:
        """How many targets enter the loss."""
        B, width = self.tokens.shape
        return B * (width - 1) if self.target_mask is None else int(self.target_mask.sum())

    def to(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Inputs and targets, (B, T) int64 on the device; unscored targets are ``IGNORE_INDEX``.

        The tokens cross as one uint16 copy; shift and cast happen on the device.
        """
        tokens = _copied_to(torch.from_numpy(self.tokens), device).long()
        inputs, targets = tokens[:, :-1], tokens[:, 1:]
        if self.target_mask is not None:
            scored = _copied_to(torch.from_numpy(self.target_mask), device)
            targets = torch.where(scored, targets, IGNORE_INDEX)
        return inputs.contiguous(), targets.contiguous()


def _copied_to(array: Tensor, device: torch.device) -> Tensor:
    if device.type == "cuda":
        return array.pin_memory().to(device, non_blocking=True)
    return array.to(device)


def expect_same_vocabulary(stream: TokenStream, model: ModelConfig, path: str) -> None:
    """Refuse tokens of another vocabulary than the model's.

    Raises:
        ConfigError: names both sizes.
    """
    tokenizer = stream.manifest.tokenizer
    if tokenizer.vocab_size != model.vocab_size:
        raise ConfigError(
            f"model.vocab_size ({model.vocab_size}) is not the vocabulary of {path} "
            f"({tokenizer.name}: {tokenizer.vocab_size}); it must be that"
        )


class TrainLoader:
    """The micro-batches of a step for one rank.

    Step data is a function of the seed and the number of samples consumed before: micro-batch j of a
    step holds samples [jB, (j+1)B) after those, and goes to rank j mod world size. The samples of a
    step, and the company each keeps in its micro-batch, are the same at every world size.
    """

    def __init__(
        self, stream: TokenStream, plan: BatchPlan, seed: int, rank: int, target_mask: TargetMask | None = None
    ) -> None:
        windows = (stream.tokens - 1) // plan.seq_len
        if windows < plan.samples_per_step:
            raise TrainingError(
                f"the split {stream.split!r} has {stream.tokens:,} tokens = {windows:,} samples of {plan.seq_len} "
                f"tokens, fewer than the {plan.samples_per_step:,} of one step; "
                f"lower batch.tokens_per_step to {max(windows, 1) * plan.seq_len} or less, or tokenize more text"
            )
        self.stream = stream
        self.plan = plan
        self.rank = rank
        self.order = SampleOrder(windows, seed)
        self.target_mask = target_mask

    def micro_batches(self, consumed: int) -> list[MicroBatch]:
        """This rank's micro-batches of the step that follows ``consumed`` samples."""
        plan = self.plan
        numbers = range(self.rank, plan.accumulation * plan.world_size, plan.world_size)
        return [self._micro_batch(consumed + number * plan.micro_batch_size) for number in numbers]

    def _micro_batch(self, first_sample: int) -> MicroBatch:
        samples = np.arange(first_sample, first_sample + self.plan.micro_batch_size, dtype=np.int64)
        starts = self.order.windows(samples) * self.plan.seq_len
        tokens = self.stream.read_windows(starts, self.plan.seq_len + 1)
        mask = self.target_mask(starts, self.plan.seq_len) if self.target_mask else None
        return MicroBatch(first_sample, tokens, mask)


def validation_batches(
    stream: TokenStream, seq_len: int, batch_size: int, rank: int, world_size: int, max_batches: int | None = None
) -> Iterator[MicroBatch]:
    """Windows in order, each target of the split scored once; batches are dealt to the ranks in turn.

    Every rank gets equally many batches (forward passes are collective under FSDP and ZeRO-3); what
    is missing is padded and masked.

    Args:
        max_batches: over all ranks; windows are then spread evenly over the split. None: all of it.
    """
    windows = -(-(stream.tokens - 1) // seq_len)
    chosen = np.arange(windows, dtype=np.int64)
    if max_batches is not None and max_batches * batch_size < windows:
        chosen = np.linspace(0, windows, max_batches * batch_size, endpoint=False, dtype=np.int64)
    batches = -(-len(chosen) // batch_size)
    rounds = -(-batches // world_size)
    for number in range(rank, rounds * world_size, world_size):
        yield _padded_batch(stream, chosen[number * batch_size : (number + 1) * batch_size], seq_len, batch_size)


def _padded_batch(stream: TokenStream, windows: IndexArray, seq_len: int, batch_size: int) -> MicroBatch:
    tokens = np.zeros((batch_size, seq_len + 1), dtype=np.uint16)
    scored = np.zeros((batch_size, seq_len), dtype=np.bool_)
    for row, window in enumerate(windows.tolist()):
        start = window * seq_len
        length = min(seq_len + 1, stream.tokens - start)
        tokens[row, :length] = stream.read(start, length)
        scored[row, : length - 1] = True
    return MicroBatch(first_sample=0, tokens=tokens, target_mask=scored)
