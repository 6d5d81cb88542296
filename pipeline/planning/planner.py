"""Estimate the peak memory, the largest possible micro-batch, and the speed of a run on N devices."""

from bisect import bisect_left
from dataclasses import dataclass, replace
from typing import Any

from pipeline.config.schema import Config
from pipeline.data.batch_plan import BatchPlan, largest_divisor, plan_batch
from pipeline.planning.activations import Peak, Request, trace_activations
from pipeline.planning.devices import Device
from pipeline.planning.memory import checkpoint_bytes, layout_of, sizes_of
from pipeline.planning.speed import Speed, estimate_speed

SECONDS_PER_DAY = 86_400


@dataclass(frozen=True)
class Memory:
    """The bytes of each kind of tensor on a rank, at the moment when the rank uses the most memory."""

    parameters: int
    masters: int
    optimizer: int
    gradients: int
    activations: int
    logits: int
    buffers: int

    @property
    def total(self) -> int:
        return sum(vars(self).values())


@dataclass(frozen=True)
class Plan:
    """The estimated memory and speed of a config with one backend and one world size."""

    backend: str
    batch: BatchPlan
    memory: Memory
    host_bytes: int  # host memory per rank, see ``host_memory``
    usable_bytes: int
    least_bytes: int  # the peak with the config's micro-batch, or with one sequence if this micro-batch does not fit
    largest_micro_batch: int  # the largest size that fits and divides the batch; 0 if none fits
    micro_batch_size: int  # for ``speed`` and ``days``: the config's size, or the largest if this size does not fit
    speed: Speed
    days: float | None  # until the token budget is used; None if no micro-batch fits

    @property
    def fits(self) -> bool:
        """Return whether the config's micro-batch fits into the memory of the device."""
        return self.memory.total <= self.usable_bytes

    @property
    def gpu_hours(self) -> float:
        """Return the hours that the run takes, multiplied by the number of devices.

        Call this only if a micro-batch fits in memory.
        """
        assert self.days is not None
        return 24 * self.days * self.batch.world_size

    def to_json(self) -> dict[str, Any]:
        memory = {**vars(self.memory), "total": self.memory.total}
        nested = {"batch": vars(self.batch), "memory": memory, "speed": self.speed.to_json()}
        return {**vars(self), **nested, "fits": self.fits}


def plan_run(
    name: str, config: Config, world_size: int, device: Device, *, mfu: float, tokens: int, grow_batch: bool = False
) -> Plan:
    """Estimate the memory and the speed of a run.

    If the micro-batch does not fit in memory, the speed is that of the largest micro-batch that fits.

    Args:
        mfu: the fraction of the device's FLOP/s that the computation reaches without communication.
        tokens: the number of training tokens in the whole run.
        grow_batch: whether to enlarge a batch that the ranks cannot divide equally. If True, the micro-batch size is
            the largest one that divides the sequences per rank, but at most that of the config. If this size fits in
            memory, it is also the ``largest_micro_batch`` of the plan.

    Raises:
        ConfigError: ``grow_batch`` is False, and the batch cannot be divided equally among the ranks.
    """
    if grow_batch:
        sequences = -(-config.batch.tokens_per_step // (config.seq_len * world_size))  # per rank, rounded up
        size = largest_divisor(sequences, config.batch.micro_batch_size)
        batch = BatchPlan(size, config.seq_len, sequences // size, world_size)
    else:
        batch = plan_batch(config, world_size)
    memory = peak_memory(config, batch)
    fits = memory.total <= device.usable_bytes
    largest = batch.micro_batch_size if grow_batch and fits else largest_micro_batch(config, batch, device)
    least = memory if fits else peak_memory(config, _divide(batch, 1))
    used = batch if fits or not largest else _divide(batch, largest)
    speed = estimate_speed(config, used, device, mfu)
    return Plan(
        backend=name,
        batch=batch,
        memory=memory,
        host_bytes=host_memory(config, batch, device),
        usable_bytes=device.usable_bytes,
        least_bytes=least.total,
        largest_micro_batch=largest,
        micro_batch_size=used.micro_batch_size,
        speed=speed,
        days=tokens / speed.tokens_per_s / SECONDS_PER_DAY if fits or largest else None,
    )


def peak_memory(config: Config, plan: BatchPlan) -> Memory:
    """Return the bytes of each kind of tensor when a rank uses the most device memory in a step.

    The first step can have another peak, because it creates the optimizer state and the buckets for gradients.
    """
    layout = layout_of(config, plan)
    request = Request(
        config.model,
        layout.compute,
        config.run.precision,
        plan.micro_batch_size,
        plan.seq_len,
        loss_in_blocks=config.run.loss_in_blocks is True,
    )
    before_update = Peak(sizes_of(config.model).total, activation_bytes=0, logit_bytes=0)

    def memory_at(peak: Peak) -> Memory:
        return Memory(
            parameters=layout.parameters,
            masters=layout.masters,
            optimizer=layout.optimizer,
            gradients=layout.gradients(peak.finished_elements),
            activations=peak.activation_bytes,
            logits=peak.logit_bytes,
            buffers=layout.buffers(peak.finished_elements),
        )

    return max(map(memory_at, (*trace_activations(request), before_update)), key=lambda memory: memory.total)


def host_memory(config: Config, plan: BatchPlan, device: Device) -> int:
    """Return the peak host memory of a rank in bytes. The memory of libraries and data does not count.

    The result is the size of the offloaded state, plus the size of the rank's share of a checkpoint. A save copies this
    share to host memory.
    """
    offloaded = layout_of(config, plan, pins_host_memory=device.is_gpu).host
    return offloaded - (-checkpoint_bytes(config) // plan.world_size)


def largest_micro_batch(config: Config, batch: BatchPlan, device: Device) -> int:
    """Return the largest micro-batch size that fits into the memory of the device, or 0 if none fits.

    The size divides the number of sequences per rank and step, so the tokens per step do not change.
    """
    sequences = batch.micro_batch_size * batch.accumulation  # per rank and step
    sizes = [size for size in range(1, sequences + 1) if sequences % size == 0]

    def fits(size: int) -> bool:
        return peak_memory(config, _divide(batch, size)).total <= device.usable_bytes

    if fits(sequences):  # a single micro-step accumulates nothing, so it may need less memory
        return sequences
    return max(sizes[: bisect_left(sizes, True, key=lambda size: not fits(size))], default=0)


def _divide(batch: BatchPlan, micro_batch_size: int) -> BatchPlan:
    accumulation = batch.micro_batch_size * batch.accumulation // micro_batch_size
    return replace(batch, micro_batch_size=micro_batch_size, accumulation=accumulation)
