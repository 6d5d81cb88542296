"""One config on so many devices: does it fit, what is the largest micro-batch, how long does it take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from pipeline.config.schema import Config
from pipeline.data.batch_plan import BatchPlan, plan_batch
from pipeline.planning.devices import Device
from pipeline.planning.memory import Memory, host_memory, peak_memory
from pipeline.planning.speed import Speed, estimate_speed

SECONDS_A_DAY = 86_400
LARGEST_MICRO_BATCH = 4096  # sequences: where the search ends


@dataclass(frozen=True)
class Plan:
    """One backend at one world size."""

    backend: str
    batch: BatchPlan
    memory: Memory
    host_bytes: int
    usable_bytes: int
    largest_micro_batch: int  # 0: not even one sequence fits
    speed: Speed
    days: float | None  # to the token budget; None: it does not fit

    @property
    def fits(self) -> bool:
        """Whether the micro-batch of the config fits."""
        return self.memory.total <= self.usable_bytes

    def to_json(self) -> dict[str, Any]:
        """Plain values; sizes in bytes."""
        memory = {**vars(self.memory), "total": self.memory.total}
        rest = {
            key: getattr(self, key) for key in ("host_bytes", "usable_bytes", "fits", "largest_micro_batch", "days")
        }
        return {"backend": self.backend, "batch": vars(self.batch), "memory": memory, **rest, "speed": vars(self.speed)}


def plan_run(
    name: str, config: Config, world_size: int, device: Device, *, mfu: float, tokens: int, grow_batch: bool = False
) -> Plan:
    """Plan a backend.

    Args:
        name: how to call it.
        tokens: the budget, over the whole run.
        grow_batch: where the ranks are too many for the batch, let the batch grow to one micro-batch a rank.

    Raises:
        ConfigError: the batch does not divide.
    """
    batch = _grown(config, world_size) if grow_batch else plan_batch(config, world_size)
    memory = peak_memory(config, batch)
    speed = estimate_speed(config, batch, device, mfu)
    fits = memory.total <= device.usable_bytes
    return Plan(
        backend=name,
        batch=batch,
        memory=memory,
        host_bytes=host_memory(config, batch),
        usable_bytes=device.usable_bytes,
        largest_micro_batch=0 if grow_batch else largest_micro_batch(config, batch, device),
        speed=speed,
        days=tokens / speed.tokens_per_s / SECONDS_A_DAY if fits else None,
    )


def _grown(config: Config, world_size: int) -> BatchPlan:
    size, seq_len = config.batch.micro_batch_size, config.seq_len
    return BatchPlan(size, seq_len, max(1, config.batch.tokens_per_step // (size * seq_len * world_size)), world_size)


def largest_micro_batch(config: Config, batch: BatchPlan, device: Device) -> int:
    """The most sequences a rank can hold at once, up to ``LARGEST_MICRO_BATCH``; the accumulation is taken to stay."""

    def fits(size: int) -> bool:
        return peak_memory(config, replace(batch, micro_batch_size=size)).total <= device.usable_bytes

    if not fits(1):
        return 0
    low, high = 1, 2
    while high <= LARGEST_MICRO_BATCH and fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return min(low, LARGEST_MICRO_BATCH)


def plan_world_sizes(
    configs: dict[str, Config], world_sizes: Sequence[int], device: Device, *, mfu: float, tokens: int
) -> dict[str, list[Plan]]:
    """The same for many world sizes, by name of the backend."""
    return {
        name: [plan_run(name, config, size, device, mfu=mfu, tokens=tokens, grow_batch=True) for size in world_sizes]
        for name, config in configs.items()
    }
