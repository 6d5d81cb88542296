"""Read the micro-batches of one rank from token shards, for training and for validation.

A sample is a window of ``seq_len`` input tokens. The target of a token is the next token. The windows cover a split
without gaps, and can cross from one shard to the next.

A target is *scored* if it counts in the loss. A loss mask has the value 1 at scored targets. Without a mask, all
targets are scored.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from data_tools.shards.reader import TokenStream
from pipeline.data.batch_plan import BatchPlan
from pipeline.data.datasets import TokenDataset
from pipeline.data.sample_order import IndexArray, Mixture, SampleOrder
from pipeline.errors import TrainingError
from pipeline.hardware.device import copy_to
from pipeline.model.output_layer import IGNORE_INDEX
from pipeline.seeds import derive_seed

COUNTED_AT_ONCE = 2**24  # entries of a mask


@dataclass(frozen=True)
class MicroBatch:
    """The samples of one rank in one micro-step. The tensors are in host memory."""

    first_sample: int  # the number of the first sample in the run; the seed of dropout depends on it
    tokens: Tensor  # (B, T + 1) uint16
    target_mask: Tensor | None = None  # (B, T) bool, True if the target is scored; None if all targets are scored

    @property
    def scored_targets(self) -> int:
        B, width = self.tokens.shape
        return B * (width - 1) if self.target_mask is None else int(self.target_mask.sum())

    def pinned(self) -> MicroBatch:
        """Return a copy in pinned memory, for asynchronous copies to a GPU.

        The caller may free the result during an asynchronous copy. PyTorch keeps the memory until the copy ends.
        """
        mask = self.target_mask
        return replace(self, tokens=self.tokens.pin_memory(), target_mask=None if mask is None else mask.pin_memory())

    def to(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return inputs and targets on the device, both int64 of shape (B, T).

        Targets that are not scored are ``IGNORE_INDEX``.
        """
        tokens = copy_to(self.tokens, device).long()
        inputs, targets = tokens[:, :-1], tokens[:, 1:]
        if self.target_mask is not None:
            targets = torch.where(copy_to(self.target_mask, device), targets, IGNORE_INDEX)
        return inputs.contiguous(), targets.contiguous()


class TrainLoader:
    """Reads the micro-batches of one rank.

    The samples of a step do not depend on the world size. They depend only on the seed and on the number of earlier
    samples. Let B be the micro-batch size. Micro-batch j contains the samples jB to (j+1)B - 1 of the step. Rank
    j mod world_size processes micro-batch j.
    """

    def __init__(self, datasets: Sequence[TokenDataset], plan: BatchPlan, seed: int, rank: int) -> None:
        """Raise TrainingError if a dataset is too small for its share of one step."""
        self.datasets = datasets
        self.plan = plan
        self.rank = rank
        self.has_mask = any(dataset.train.has_mask for dataset in datasets)
        self.mixture = Mixture([dataset.weight for dataset in datasets])
        # The first dataset uses the run's own seed, so a mixture of one dataset gives the same order as ``data.path``.
        seeds = [seed, *(derive_seed(seed, "part", index) for index in range(1, len(datasets)))]
        self.orders = [SampleOrder(self._count_windows(index), seeds[index]) for index in range(len(datasets))]

    def micro_batches(self, consumed: int) -> list[MicroBatch]:
        """Return the micro-batches of this rank in the step after ``consumed`` samples.

        Raises:
            DataError: a shard contains an invalid token or mask value.
        """
        plan = self.plan
        size = plan.micro_batch_size
        numbers = np.arange(self.rank, plan.accumulation * plan.world_size, plan.world_size, dtype=np.int64)
        firsts = consumed + numbers * size  # (accumulation,)
        tokens, masks = self._read((firsts[:, None] + np.arange(size, dtype=np.int64)).ravel())
        return [
            MicroBatch(first, tokens[at : at + size], None if masks is None else masks[at : at + size])
            for first, at in zip(firsts.tolist(), range(0, len(tokens), size), strict=True)
        ]

    def _read(self, samples: IndexArray) -> tuple[Tensor, Tensor | None]:
        """Return tokens, (samples, T + 1) uint16, and masks, (samples, T) bool or None."""
        seq_len = self.plan.seq_len
        tokens = np.empty((len(samples), seq_len + 1), dtype=np.uint16)
        masks = np.ones((len(samples), seq_len), dtype=np.bool_) if self.has_mask else None
        chosen, ordinals = self.mixture.locate_all(samples)
        for index in np.unique(chosen).tolist():
            stream, rows = self.datasets[index].train, np.flatnonzero(chosen == index)
            starts = self.orders[index].windows(ordinals[rows]) * seq_len
            tokens[rows] = stream.read_windows(starts, seq_len + 1)
            if masks is not None and stream.has_mask:
                masks[rows] = stream.read_mask_windows(starts + 1, seq_len)
        return torch.from_numpy(tokens), None if masks is None else torch.from_numpy(masks)

    def _count_windows(self, index: int) -> int:
        train, plan, share = self.datasets[index].train, self.plan, self.mixture.shares[index]
        windows = (train.tokens - 1) // plan.seq_len
        needed = math.ceil(share * plan.samples_per_step)
        if windows >= needed:
            return windows
        found = f"has {train.tokens:,} tokens = {windows:,} samples of {plan.seq_len} tokens, fewer than the"
        if len(self.datasets) == 1:
            raise TrainingError(
                f"the split {train.split!r} {found} {plan.samples_per_step:,} of one step; "
                f"{suggest_batch(train.tokens, plan)}, or tokenize more text"
            )
        raise TrainingError(
            f"data.mixture: the split {train.split!r} of {self.datasets[index].path} {found} {needed:,} per step that "
            f"its share of {float(share):.2%} takes; lower its weight or batch.tokens_per_step, or tokenize more text"
        )


def suggest_batch(tokens: int, plan: BatchPlan) -> str:
    """Return advice for an error message: config values for which a split of ``tokens`` tokens is large enough."""
    windows = (tokens - 1) // plan.seq_len
    if windows < plan.world_size:
        longest = (tokens - 1) // plan.world_size
        if longest < 1:
            return f"start fewer than {plan.world_size} processes"
        return f"set data.seq_len to {longest}, batch.micro_batch_size to 1 and batch.tokens_per_step to " + str(
            longest * plan.world_size
        )
    micro_batch_size = min(plan.micro_batch_size, windows // plan.world_size)
    unit = micro_batch_size * plan.world_size
    smaller = f" and batch.micro_batch_size to {micro_batch_size}" if micro_batch_size < plan.micro_batch_size else ""
    return f"lower batch.tokens_per_step to {windows // unit * unit * plan.seq_len}{smaller}"


class Prefetcher:
    """Reads the micro-batches of the next step in a thread, while the device computes the current step.

    If a call requests a step that the thread has not read, the call reads this step itself.
    """

    def __init__(self, loader: TrainLoader, device: torch.device) -> None:
        self._loader = loader
        self._device = device
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="prefetch")
        self._ahead: tuple[int, Future[list[MicroBatch]]] | None = None

    def micro_batches(self, consumed: int) -> list[MicroBatch]:
        """Return the micro-batches of this rank in the step after ``consumed`` samples.

        If the prefetch thread failed to read this step, this call raises the thread's error.
        """
        ahead, self._ahead = self._ahead, None
        batches = ahead[1].result() if ahead and ahead[0] == consumed else self._read(consumed)
        following = consumed + self._loader.plan.samples_per_step
        self._ahead = following, self._thread.submit(self._read, following)
        return batches

    def close(self) -> None:
        self._ahead = None
        self._thread.shutdown(cancel_futures=True)

    def _read(self, consumed: int) -> list[MicroBatch]:
        batches = self._loader.micro_batches(consumed)
        if self._device.type != "cuda":
            return batches
        with torch.cuda.device(self._device):  # the current device of a new thread is the first GPU
            return [batch.pinned() for batch in batches]


def validation_batches(
    stream: TokenStream, seq_len: int, batch_size: int, rank: int, world_size: int, max_batches: int | None = None
) -> Iterator[MicroBatch]:
    """Yield the validation batches of this rank, in the order of the split.

    Every rank gets the same number of batches, because forward passes are collective under FSDP and ZeRO-3. The last
    batches may contain padding, which is not scored.

    Args:
        max_batches: the maximum total number of batches of all ranks. Batches that contain only padding do not count.
            If the split has more batches, the windows are spread evenly over the split. If None, there is no limit.
    """
    windows = -(-(stream.tokens - 1) // seq_len)
    chosen = np.arange(windows, dtype=np.int64)
    if max_batches is not None and max_batches * batch_size < windows:
        chosen = np.linspace(0, windows, max_batches * batch_size, endpoint=False, dtype=np.int64)
    batches = -(-len(chosen) // batch_size)
    rounds = -(-batches // world_size)
    for number in range(rank, rounds * world_size, world_size):
        yield _padded_batch(stream, chosen[number * batch_size : (number + 1) * batch_size], seq_len, batch_size)


def scored_targets(stream: TokenStream, seq_len: int) -> IndexArray:
    """Return the number of scored targets per window of a split with a mask: int64 of shape (windows,).

    The last window may be shorter than ``seq_len``.
    """
    targets = stream.tokens - 1
    block = max(COUNTED_AT_ONCE // seq_len, 1) * seq_len
    counts = [
        np.add.reduceat(mask, np.arange(0, mask.size, seq_len), dtype=np.int64)
        for start in range(0, targets, block)
        for mask in stream.read_mask_windows(np.array([start + 1]), min(block, targets - start))
    ]
    return np.concatenate(counts) if counts else np.zeros(0, dtype=np.int64)


def _padded_batch(stream: TokenStream, windows: IndexArray, seq_len: int, batch_size: int) -> MicroBatch:
    tokens = np.zeros((batch_size, seq_len + 1), dtype=np.uint16)
    scored = np.zeros((batch_size, seq_len), dtype=np.bool_)
    for row, window in enumerate(windows.tolist()):
        start = window * seq_len
        length = min(seq_len, stream.tokens - 1 - start)  # targets
        tokens[row, : length + 1] = stream.read(start, length + 1)
        if stream.has_mask:
            scored[row, :length] = stream.read_mask_windows(np.array([start + 1], dtype=np.int64), length)[0]
        else:
            scored[row, :length] = True
    return MicroBatch(first_sample=0, tokens=torch.from_numpy(tokens), target_mask=torch.from_numpy(scored))
