"""Estimate what a rank sends per step, and how long the step takes.

Collectives are counted as rings: an all-gather or a reduce-scatter of n bytes sends n (W-1)/W from each rank, an
all-reduce twice that (Rajbhandari et al. 2020, section 7).
"""

from dataclasses import dataclass

from pipeline.config.schema import Config
from pipeline.data.batch_plan import BatchPlan
from pipeline.model.gpt2 import flops_per_token
from pipeline.planning.devices import GB, Device
from pipeline.planning.layouts import BF16, FP32, MOMENTS, sizes_of

LINK_EFFICIENCY = 0.7  # assumed fraction of a link's published bandwidth
BACKWARD_SHARE = 2 / 3  # of a micro-step's FLOPs; reductions overlap with the backward pass
#: Bytes per element of CPUAdam, which reads weight, moments and gradient and writes the first two. They are assumed to
#: pass at the speed of the host link.
CPU_ADAM_BYTES = 2 * (FP32 + MOMENTS) + FP32


@dataclass(frozen=True)
class Traffic:
    """Bytes that one rank sends per optimizer step, by the time at which it sends them."""

    with_each_micro_step: int  # gathers and reductions that overlap with all of its computing
    with_last_backward: int  # reductions that overlap with the last backward pass
    after_backward: int  # overlaps with nothing
    to_and_from_host: int  # offload

    def per_step(self, accumulation: int) -> int:
        """Return the bytes sent to other ranks in a whole step."""
        return accumulation * self.with_each_micro_step + self.with_last_backward + self.after_backward


@dataclass(frozen=True)
class Speed:
    """A step of all ranks."""

    sent_bytes: int  # by each rank
    compute_s: float
    exposed_communication_s: float
    tokens_per_s: float


def traffic(config: Config, plan: BatchPlan) -> Traffic:
    """Return the traffic of the backend's collectives, in the dtypes that the backend uses."""
    elements = sizes_of(config.model).total
    share = (plan.world_size - 1) / plan.world_size
    weight_width = BF16 if config.run.precision == "bf16" else FP32
    gradients, weights = (int(share * elements * width) for width in (FP32, weight_width))
    if config.backend.name == "ddp":
        return Traffic(0, 2 * gradients, 0, 0)
    if config.backend.name == "fsdp":
        gathers = 2 if config.backend.fsdp.reshard_after_forward else 1
        return Traffic(gathers * weights, gradients, 0, 0)
    is_offloaded = config.backend.offloads("optimizer")
    host = (2 * FP32 + CPU_ADAM_BYTES) * elements // plan.world_size if is_offloaded else 0
    by_stage = (
        Traffic(0, 0, 2 * gradients, host),
        Traffic(0, gradients, weights, host),
        Traffic(gradients, 0, weights, host),
        Traffic(2 * weights + gradients, 0, 0, host),
    )
    return by_stage[config.backend.zero_stage]


def estimate_speed(config: Config, plan: BatchPlan, device: Device, mfu: float) -> Speed:
    """Estimate the time of a step from FLOP/s and bandwidth. Communication counts where it exceeds the computing.

    Args:
        mfu: fraction of the device's FLOP/s that computing reaches, without communication.
    """
    sent = traffic(config, plan)
    tokens_per_rank = plan.micro_batch_size * plan.seq_len
    flops = tokens_per_rank * flops_per_token(config.model, plan.seq_len) * _recomputation(config)
    micro_step_s = flops / (device.flops(config.run.precision) * mfu)
    link = LINK_EFFICIENCY * device.link_bytes_per_s(plan.world_size)
    exposed_s = (
        plan.accumulation * max(0.0, sent.with_each_micro_step / link - micro_step_s)
        + max(0.0, sent.with_last_backward / link - BACKWARD_SHARE * micro_step_s)
        + sent.after_backward / link
        + sent.to_and_from_host / (LINK_EFFICIENCY * device.host_gb_per_s * GB)
    )
    compute_s = plan.accumulation * micro_step_s
    return Speed(sent.per_step(plan.accumulation), compute_s, exposed_s, plan.tokens_per_step / (compute_s + exposed_s))


def _recomputation(config: Config) -> float:
    """Return executed FLOPs / model FLOPs: a recomputed block repeats its forward pass, one third of its FLOPs."""
    recomputed = sum(config.model.recomputes_block(i) for i in range(config.model.n_layer))
    return 1 + recomputed / config.model.n_layer / 3
