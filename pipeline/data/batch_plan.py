"""Compute the number of micro-steps per optimizer step."""

from dataclasses import dataclass

from data_tools.formatting import count_of
from pipeline.config.schema import HPZ, BackendConfig, Config
from pipeline.errors import ConfigError


@dataclass(frozen=True)
class BatchPlan:
    """The division of an optimizer step into micro-steps. In each micro-step, every rank computes one micro-batch."""

    micro_batch_size: int  # sequences per rank and micro-step
    seq_len: int  # tokens per sequence
    accumulation: int  # micro-steps per optimizer step
    world_size: int

    @property
    def samples_per_step(self) -> int:
        """Return the number of sequences per optimizer step, over all ranks."""
        return self.micro_batch_size * self.accumulation * self.world_size

    @property
    def tokens_per_step(self) -> int:
        """Return the number of target tokens per optimizer step, over all ranks."""
        return self.samples_per_step * self.seq_len

    def __str__(self) -> str:
        return (
            f"{count_of(self.tokens_per_step, 'token')} per step = {count_of(self.micro_batch_size, 'sequence')} x "
            f"{count_of(self.seq_len, 'token')} x {count_of(self.accumulation, 'micro-step')} x "
            f"{count_of(self.world_size, 'rank')}"
        )


def plan_batch(config: Config, world_size: int) -> BatchPlan:
    """Divide the batch of an optimizer step into micro-batches.

    Raises:
        ConfigError: ``batch.tokens_per_step``, or a group size of FSDP or hpZ, does not fit the number of ranks.
    """
    _check_groups(config.backend, world_size)
    batch, seq_len = config.batch, config.seq_len
    unit = batch.micro_batch_size * seq_len * world_size
    accumulation, rest = divmod(batch.tokens_per_step, unit)
    if rest or accumulation == 0:
        totals = [count * unit for count in (accumulation, accumulation + 1) if count > 0]
        message = (
            f"batch.tokens_per_step ({batch.tokens_per_step}) is not a multiple of micro_batch_size x seq_len x ranks "
            f"= {batch.micro_batch_size} x {seq_len} x {world_size} = {unit}; "
            f"tokens_per_step that would fit: {', '.join(map(str, totals))}"
        )
        sequences, rest = divmod(batch.tokens_per_step, seq_len * world_size)
        if not rest:
            fitting = [size for size in range(1, min(sequences, 1024) + 1) if sequences % size == 0]
            message += f"; or batch.micro_batch_size: {', '.join(map(str, fitting))}"
        raise ConfigError(message)
    return BatchPlan(batch.micro_batch_size, seq_len, accumulation, world_size)


def largest_divisor(sequences: int, limit: int) -> int:
    """Return the largest divisor of ``sequences`` that is at most ``limit``."""
    return max(size for size in range(1, min(limit, sequences) + 1) if sequences % size == 0)


def _check_groups(backend: BackendConfig, world_size: int) -> None:
    if backend.name == "fsdp":
        key, size, off = "backend.fsdp.shard_group_size", backend.fsdp.shard_group_size, "null for all ranks"
    else:
        key, size, off = f"backend.deepspeed.zero_optimization.{HPZ}", backend.hpz_group_size, "leave it out"
    if size and world_size % size:
        fitting = [str(divisor) for divisor in range(1, world_size + 1) if world_size % divisor == 0]
        raise ConfigError(
            f"{key} ({size}) does not divide the number of ranks ({world_size}); sizes that would fit: "
            f"{', '.join(fitting)}, or {off}"
        )
