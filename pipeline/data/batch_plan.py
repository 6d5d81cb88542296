"""From a batch in tokens to accumulation, for the world size that a run really has."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.config.schema import Config
from pipeline.errors import ConfigError


@dataclass(frozen=True)
class BatchPlan:
    """How the samples of one optimizer step are cut into micro-batches and dealt to ranks."""

    micro_batch_size: int  # sequences per rank and micro-step
    seq_len: int  # tokens per sequence
    accumulation: int  # micro-steps per optimizer step
    world_size: int

    @property
    def samples_per_step(self) -> int:
        """Sequences of one optimizer step over all ranks."""
        return self.micro_batch_size * self.accumulation * self.world_size

    @property
    def tokens_per_step(self) -> int:
        """Target positions of one optimizer step over all ranks."""
        return self.samples_per_step * self.seq_len

    def __str__(self) -> str:
        return (
            f"{self.tokens_per_step:,} tokens per step = {self.micro_batch_size} sequences x {self.seq_len} tokens "
            f"x {self.accumulation} micro-steps x {self.world_size} ranks"
        )


def plan_batch(config: Config, world_size: int) -> BatchPlan:
    """Derive the accumulation.

    Raises:
        ConfigError: the batch does not divide; the message lists batches that would.
    """
    batch, seq_len = config.batch, config.seq_len
    tokens_per_micro_step = batch.micro_batch_size * seq_len * world_size
    accumulation, rest = divmod(batch.tokens_per_step, tokens_per_micro_step)
    if rest or accumulation == 0:
        raise ConfigError(_what_would_fit(batch.tokens_per_step, batch.micro_batch_size, seq_len, world_size))
    return BatchPlan(batch.micro_batch_size, seq_len, accumulation, world_size)


def _what_would_fit(tokens_per_step: int, micro_batch_size: int, seq_len: int, world_size: int) -> str:
    unit = micro_batch_size * seq_len * world_size
    below = tokens_per_step // unit
    totals = [count * unit for count in (below, below + 1) if count > 0]
    message = (
        f"batch.tokens_per_step ({tokens_per_step}) is not a multiple of micro_batch_size x seq_len x ranks = "
        f"{micro_batch_size} x {seq_len} x {world_size} = {unit}; "
        f"tokens_per_step that would fit: {', '.join(map(str, totals))}"
    )
    sequences, rest = divmod(tokens_per_step, seq_len * world_size)
    if not rest:
        fitting = [size for size in range(1, min(sequences, 1024) + 1) if sequences % size == 0]
        message += f"; or batch.micro_batch_size: {', '.join(map(str, fitting))}"
    return message
