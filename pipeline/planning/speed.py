"""Estimate how many bytes a rank sends per step, and how long a step takes.

The estimate assumes ring collectives between W ranks. In an all-gather or a reduce-scatter of n bytes, each rank sends
n (W-1)/W bytes. In an all-reduce, it sends twice as many bytes (Rajbhandari et al. 2020, section 7).
"""

from dataclasses import dataclass, replace

from pipeline.config.schema import Config
from pipeline.data.batch_plan import BatchPlan
from pipeline.model.gpt2 import flops_per_token
from pipeline.model.muon_matrices import Matrix, muon_matrices
from pipeline.planning.devices import GB, Device
from pipeline.planning.layouts import BF16, FP32, sizes_of

LINK_EFFICIENCY = 0.7  # assumed fraction of a link's published bandwidth
BACKWARD_SHARE = 2 / 3  # of a micro-step's FLOPs; reductions overlap with the backward pass
#: Bytes per element that CPUAdam reads (weight, moments, gradient) and writes (weight, moments). The plan assumes the
#: bandwidth of the link between device and host for these bytes.
CPU_ADAM_BYTES = 2 * (FP32 + 2 * FP32) + FP32


@dataclass(frozen=True)
class Traffic:
    """The bytes that one rank sends per optimizer step. There is one field for each phase of a step."""

    with_each_micro_step: int  # gathers and reductions that overlap with the computation of a micro-step
    with_last_backward: int  # reductions that overlap with the last backward pass
    after_backward: int  # communication that does not overlap
    to_and_from_host: int  # copies of offloaded state
    with_first_forward: int = 0  # gathers of weights that stay gathered until the end of the step
    between_copies: int = 0  # reductions between the copies of the model, which overlap with the last backward pass

    def per_step(self, accumulation: int) -> int:
        """Return how many bytes a rank sends to other ranks in one optimizer step.

        Args:
            accumulation: the number of micro-steps per optimizer step.
        """
        once = self.with_first_forward + self.with_last_backward + self.after_backward + self.between_copies
        return accumulation * self.with_each_micro_step + once


@dataclass(frozen=True)
class Speed:
    """The estimated duration and speed of a step."""

    sent_bytes: int  # bytes that each rank sends
    compute_s: float
    exposed_communication_s: float
    tokens_per_s: float


def traffic(config: Config, plan: BatchPlan) -> Traffic:
    """Return how many bytes one rank sends in the collectives of the backend."""
    of_backend = _traffic_of_backend(config, plan)
    return replace(of_backend, after_backward=of_backend.after_backward + _muon_traffic(config, plan.world_size))


def _muon_traffic(config: Config, ranks: int) -> int:
    """Return the bytes that a rank sends to assemble matrices and to return their updates."""
    elements = sum(matrix.numel for matrix in _matrices(config))
    width = FP32 if config.run.precision == "fp32" else BF16
    group = config.backend.ranks_per_copy(ranks)
    # A rank holds 1/group of the elements, and sends group/ranks of them to the owners in its group. Each owner then
    # sends the updates of its matrices to all other ranks that hold the elements.
    return width * elements * ((group - 1) + (ranks - 1)) // (ranks * group)


def _matrices(config: Config) -> list[Matrix]:
    """Return the matrices that Muon updates. Returns an empty list for AdamW."""
    if config.optimizer.name != "muon":
        return []
    return list(muon_matrices(sizes_of(config.model).shapes, split_qkv=config.optimizer.muon.split_qkv))


def _traffic_of_backend(config: Config, plan: BatchPlan) -> Traffic:
    sizes = sizes_of(config.model)
    elements = sizes.total
    group = _ranks_of_most_collectives(config, plan)
    share = (group - 1) / group
    weight_width = BF16 if config.run.precision == "bf16" else FP32
    gradients, weights, root = (
        int(share * size) for size in (FP32 * elements, weight_width * elements, weight_width * sizes.root)
    )
    if config.backend.name == "ddp":
        return Traffic(0, 2 * gradients, 0, 0)
    if config.backend.name == "fsdp":
        once = root if config.backend.fsdp.reshard_after_forward else weights
        copies = plan.world_size // group
        reduced = 2 * (FP32 * elements // group) * (copies - 1) // copies
        return Traffic(2 * (weights - once), gradients, 0, 0, with_first_forward=once, between_copies=reduced)
    is_offloaded = config.backend.offloads("optimizer")
    host = (2 * FP32 + CPU_ADAM_BYTES) * elements // plan.world_size if is_offloaded else 0
    by_stage = (
        Traffic(0, 0, 2 * gradients, host),
        Traffic(0, gradients, weights, host),
        Traffic(gradients, 0, weights, host),
        Traffic(2 * weights + gradients, 0, 0, host),
    )
    return by_stage[config.backend.zero_stage]


def _ranks_of_most_collectives(config: Config, plan: BatchPlan) -> int:
    """Return the number of ranks that gather weights and reduce gradients together: all ranks, or a shard group."""
    return config.backend.ranks_per_copy(plan.world_size) if config.backend.name == "fsdp" else plan.world_size


def estimate_speed(config: Config, plan: BatchPlan, device: Device, mfu: float) -> Speed:
    """Estimate the duration of a step from the FLOP/s and the bandwidths of a device.

    If communication overlaps with computation and is not slower, it adds no time.

    Args:
        plan: how the batch is divided among the ranks and micro-steps.
        mfu: the fraction of the device's FLOP/s that the computation would reach without communication.
    """
    sent = traffic(config, plan)
    tokens_per_rank = plan.micro_batch_size * plan.seq_len
    flops = tokens_per_rank * flops_per_token(config.model, plan.seq_len) * _recomputation(config)
    micro_step_s = flops / (device.flops(config.run.precision) * mfu)
    within_group, between_all = (
        LINK_EFFICIENCY * device.link_bytes_per_s(plan.world_size, group_size=size)
        for size in (_ranks_of_most_collectives(config, plan), plan.world_size)
    )
    last_reduction_s = sent.with_last_backward / within_group + sent.between_copies / between_all
    exposed_s = (
        plan.accumulation * max(0.0, sent.with_each_micro_step / within_group - micro_step_s)
        + max(0.0, sent.with_first_forward / within_group - (1 - BACKWARD_SHARE) * micro_step_s)
        + max(0.0, last_reduction_s - BACKWARD_SHARE * micro_step_s)
        + sent.after_backward / between_all
        + sent.to_and_from_host / (LINK_EFFICIENCY * device.host_gb_per_s * GB)
    )
    iterations = config.optimizer.muon.iterations
    update_flops = sum(matrix.orthogonalization_flops(iterations) for matrix in _matrices(config))
    update_s = update_flops / plan.world_size / (device.flops(config.run.precision) * mfu)
    compute_s = plan.accumulation * micro_step_s + update_s
    return Speed(sent.per_step(plan.accumulation), compute_s, exposed_s, plan.tokens_per_step / (compute_s + exposed_s))


def _recomputation(config: Config) -> float:
    """Return executed FLOPs / model FLOPs. A recomputed block repeats its forward pass, one third of its FLOPs."""
    recomputed = sum(config.model.recomputes_block(i) for i in range(config.model.n_layer))
    return 1 + recomputed / config.model.n_layer / 3
