"""Estimate how long a step takes, from the computation of its stages and from its collectives."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from pipeline.config.schema import Config
from pipeline.data.batch_plan import BatchPlan
from pipeline.model.gpt2 import flops_per_token
from pipeline.planning.collectives import Stage, StepCollectives, muon_matrices_of, step_collectives
from pipeline.planning.communication import Cluster, Collective, Link
from pipeline.planning.devices import GB, Device
from pipeline.planning.memory import FP32, sizes_of

LINK_EFFICIENCY = 0.7  # assumed fraction of a link's published bandwidth
#: Bytes per element that CPUAdam reads (weight, moments, gradient) and writes (weight, moments). The plan assumes that
#: this memory traffic has the bandwidth of the link between device and host.
CPU_ADAM_BYTES = 2 * (FP32 + 2 * FP32) + FP32


@dataclass(frozen=True)
class Waits:
    """The seconds per step that a rank waits without computing, by the cause of the wait."""

    latency_s: float = 0.0  # of the messages of collectives
    within_host_s: float = 0.0  # for bytes on the links within a host
    between_hosts_s: float = 0.0  # for bytes on the links between hosts
    offload_s: float = 0.0  # for copies to and from host memory, and for the optimizer on the host

    @property
    def total_s(self) -> float:
        return sum(vars(self).values())


@dataclass(frozen=True)
class Speed:
    sent_bytes: int  # bytes that each rank sends
    compute_s: float
    waits: Waits
    tokens_per_s: float

    @property
    def efficiency(self) -> float:
        """Return the fraction of a step's time in which a rank computes."""
        return self.compute_s / (self.compute_s + self.waits.total_s)

    def to_json(self) -> dict[str, Any]:
        derived = {"exposed_communication_s": self.waits.total_s, "efficiency": self.efficiency}
        return {**vars(self), "waits": vars(self.waits), **derived}


def estimate_speed(config: Config, plan: BatchPlan, device: Device, mfu: float) -> Speed:
    """Estimate the duration of a step from the FLOP/s and the links of a device.

    Args:
        mfu: the fraction of the device's FLOP/s that the computation reaches without communication.
    """
    rate = device.flops(config.run.precision) * mfu
    pass_s = plan.micro_batch_size * plan.seq_len * flops_per_token(config.model, plan.seq_len) / rate
    collectives = step_collectives(config, plan)
    iterations = config.optimizer.muon.iterations
    update_flops = sum(matrix.orthogonalization_flops(iterations) for matrix in muon_matrices_of(config))
    compute_s = compute_seconds(collectives, pass_s) + update_flops / plan.world_size / rate
    waits = communication_waits(
        collectives, pass_s, cluster_of(device, plan.world_size), overlaps=overlaps(config, device)
    )
    waits = replace(waits, offload_s=_offload_seconds(config, plan, device))
    return Speed(collectives.sent_bytes, compute_s, waits, plan.tokens_per_step / (compute_s + waits.total_s))


def cluster_of(device: Device, world_size: int) -> Cluster:
    """Return a cluster of nodes with devices of this type.

    Each bandwidth is multiplied by ``LINK_EFFICIENCY``, because collectives do not reach the whole bandwidth of a link.
    """
    return Cluster(
        min(device.per_node, world_size),
        Link(LINK_EFFICIENCY * GB * device.node_gb_per_s, 1e-6 * device.node_latency_us),
        Link(LINK_EFFICIENCY * GB * device.network_gb_per_s, 1e-6 * device.network_latency_us),
    )


def overlaps(config: Config, device: Device) -> bool:
    """Return whether the backend computes while its collectives run.

    On a CPU, FSDP2 and DeepSpeed wait for each collective of gloo.
    """
    backend = config.backend
    if backend.name == "deepspeed":
        return device.is_gpu and bool(backend.zero.get("overlap_comm", backend.zero_stage == 3))
    return device.is_gpu or backend.name == "ddp"


def compute_seconds(collectives: StepCollectives, pass_s: float) -> float:
    """Return the computing time of all micro-steps of one step.

    The result includes the time for recomputing blocks in the backward pass.

    Args:
        pass_s: the computing time of one micro-step that recomputes no block.
    """
    return pass_s * sum(count * sum(stage.share for stage in stages) for count, stages in collectives.micro_steps())


def communication_waits(collectives: StepCollectives, pass_s: float, cluster: Cluster, *, overlaps: bool) -> Waits:
    """Return how long a rank waits for collectives in a step, by cause.

    The function estimates the wait three times:

    1. for the real links;
    2. for links without latency;
    3. for links without latency, and with infinite bandwidth between hosts.

    The wait for latency is (1) - (2). The wait for links between hosts is (2) - (3). The wait for links within hosts is
    (3).

    Args:
        pass_s: the computing time of one micro-step, without recomputation.
        overlaps: whether the rank computes while a collective runs.
    """
    prompt = replace(
        cluster,
        within_host=Link(cluster.within_host.bytes_per_s, 0.0),
        between_hosts=Link(cluster.between_hosts.bytes_per_s, 0.0),
    )
    single_host = replace(prompt, between_hosts=Link(math.inf, 0.0))
    total, of_bytes, within_host = (
        _exposed_seconds(collectives, pass_s, each, overlaps=overlaps) for each in (cluster, prompt, single_host)
    )
    return Waits(total - of_bytes, within_host, of_bytes - within_host)


def _exposed_seconds(collectives: StepCollectives, pass_s: float, cluster: Cluster, *, overlaps: bool) -> float:
    micro_steps_s = sum(
        count * micro_step_seconds(stages, pass_s, cluster, overlaps=overlaps)
        for count, stages in collectives.micro_steps()
    )
    after_s = _seconds(collectives.after, cluster)
    return micro_steps_s + after_s - compute_seconds(collectives, pass_s)


def micro_step_seconds(stages: Sequence[Stage], pass_s: float, cluster: Cluster, *, overlaps: bool) -> float:
    """Return the duration of a micro-step.

    Args:
        pass_s: the computing time of one micro-step, without recomputation.
        overlaps: whether the rank computes while a collective runs. If True, a stage issues the gathers of the next
            stage at its beginning, and its own reductions at its end. One collective runs at a time. The micro-step
            ends when the last stage and all reductions have ended.
    """
    gathers_s = [_seconds(stage.gathers, cluster) for stage in stages]
    reductions_s = [_seconds(stage.reductions, cluster) for stage in stages]
    computes_s = [pass_s * stage.share for stage in stages]
    if not overlaps:
        return sum(gathers_s) + sum(reductions_s) + sum(computes_s)
    computed_s, sent_s = 0.0, gathers_s[0]  # when the rank has finished the computation and the communication so far
    gathered_s = sent_s  # when the weights of the stage have been gathered
    for compute_s, reduction_s, next_gather_s in zip(computes_s, reductions_s, [*gathers_s[1:], 0.0], strict=True):
        start_s = max(computed_s, gathered_s)
        if next_gather_s:
            sent_s = max(sent_s, start_s) + next_gather_s
        gathered_s = sent_s if next_gather_s else 0.0
        computed_s = start_s + compute_s
        if reduction_s:
            sent_s = max(sent_s, computed_s) + reduction_s
    return max(computed_s, sent_s)


def _seconds(collectives: Sequence[Collective], cluster: Cluster) -> float:
    return sum(map(cluster.seconds, collectives))


def _offload_seconds(config: Config, plan: BatchPlan, device: Device) -> float:
    if not config.backend.offloads("optimizer"):
        return 0.0
    copied = (2 * FP32 + CPU_ADAM_BYTES) * sizes_of(config.model).total // plan.world_size
    return copied / (LINK_EFFICIENCY * device.host_gb_per_s * GB)
