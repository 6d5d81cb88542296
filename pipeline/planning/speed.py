"""What a rank sends in a step, and how long the step takes.

Collectives are counted as rings: an all-gather or a reduce-scatter of n bytes sends n (W-1)/W from each rank, an
all-reduce twice that (Rajbhandari et al. 2020, section 7).
"""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.config.schema import Config
from pipeline.data.batch_plan import BatchPlan
from pipeline.model.gpt2 import flops_per_token
from pipeline.planning.devices import Device
from pipeline.planning.layouts import BF16, FP32, MOMENTS, offloads, sizes_of

LINK_EFFICIENCY = 0.7  # of a link's published bandwidth, assumed
BACKWARD_SHARE = 2 / 3  # of a micro-step's FLOPs: what reductions hide behind
#: CPUAdam reads weight, moments and gradient and writes the first two: bytes an element, assumed to pass at the link's
#: speed.
CPU_ADAM_BYTES = 2 * (FP32 + MOMENTS) + FP32


@dataclass(frozen=True)
class Traffic:
    """Bytes that one rank sends between ranks in an optimizer step, by when they are sent."""

    with_each_micro_step: int  # gathers and reductions beside all of its computing
    with_last_backward: int  # reductions beside the last backward pass
    after_backward: int  # nothing left to hide behind
    to_and_from_host: int  # offload, through the link to the host

    def per_step(self, accumulation: int) -> int:
        """Between ranks, in a whole step."""
        return accumulation * self.with_each_micro_step + self.with_last_backward + self.after_backward


@dataclass(frozen=True)
class Speed:
    """A step of all ranks."""

    sent_bytes: int  # by each rank
    compute_s: float
    exposed_communication_s: float
    tokens_per_s: float


def traffic(config: Config, plan: BatchPlan) -> Traffic:
    """What the backend's collectives are given, in the dtypes that it gives them in."""
    elements = sizes_of(config.model).total
    share = (plan.world_size - 1) / plan.world_size
    is_bf16 = config.run.precision == "bf16"
    gradients, weights = (int(share * elements * width) for width in (FP32, BF16 if is_bf16 else FP32))
    if config.backend.name == "fsdp":
        gathers = 2 if config.backend.fsdp.reshard_after_forward else 1
        return Traffic(gathers * weights, gradients, 0, 0)
    zero = config.backend.deepspeed.get("zero_optimization", {})
    stage = int(zero.get("stage", 0)) if config.backend.name == "deepspeed" else None
    if stage is None:
        return Traffic(0, 2 * gradients, 0, 0)
    if stage == 0:
        return Traffic(0, 0, 2 * gradients, 0)
    is_offloaded = offloads(zero, "offload_optimizer")
    host = (2 * FP32 + CPU_ADAM_BYTES) * elements // plan.world_size if is_offloaded else 0
    if stage == 1:
        return Traffic(0, gradients, weights, host)
    if stage == 2:
        return Traffic(gradients, 0, weights, host)
    return Traffic(2 * weights + gradients, 0, 0, host)


def estimate_speed(config: Config, plan: BatchPlan, device: Device, mfu: float) -> Speed:
    """Time of a step from FLOP/s and bandwidth; what computing does not hide is added to it.

    Args:
        mfu: share of the device's FLOP/s that computing reaches, communication apart.
    """
    sent = traffic(config, plan)
    tokens_per_rank = plan.micro_batch_size * plan.seq_len
    flops = tokens_per_rank * flops_per_token(config.model, plan.seq_len) * _recomputation(config)
    micro_step_s = flops / (device.flops(config.run.precision) * mfu)
    link = LINK_EFFICIENCY * (
        device.node_bytes_per_s if plan.world_size <= device.per_node else device.network_bytes_per_s
    )
    exposed_s = (
        plan.accumulation * max(0.0, sent.with_each_micro_step / link - micro_step_s)
        + max(0.0, sent.with_last_backward / link - BACKWARD_SHARE * micro_step_s)
        + sent.after_backward / link
        + sent.to_and_from_host / (LINK_EFFICIENCY * device.host_bytes_per_s)
    )
    compute_s = plan.accumulation * micro_step_s
    return Speed(sent.per_step(plan.accumulation), compute_s, exposed_s, plan.tokens_per_step / (compute_s + exposed_s))


def _recomputation(config: Config) -> float:
    """FLOPs that are done over FLOPs that count: a recomputed block does its forward pass, a third, once more."""
    recomputed = sum(config.model.recomputes_block(i) for i in range(config.model.n_layer))
    return 1 + recomputed / config.model.n_layer / 3
