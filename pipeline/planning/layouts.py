"""Where each backend keeps weights, masters, moments, gradients and buffers: bytes on the rank that has most.

Each formula follows what this project's backends do with torch 2.13 and DeepSpeed 0.19.8; ``docs/planning.md`` names
the source of every term, and ``make plan-check`` compares them with measured peaks and with the real wrapping code.
N is the number of parameters (with padding rows), W the number of ranks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from pipeline.config.schema import Config, ModelConfig
from pipeline.data.batch_plan import BatchPlan
from pipeline.model.gpt2 import GPT2
from pipeline.planning.activations import Compute

FP32, BF16, MOMENTS = 4, 2, 8  # bytes an element; AdamW has two moments

#: DeepSpeed's defaults (runtime/zero/config.py of 0.19.8) of what is read below, in elements.
REDUCE_BUCKET_ELEMENTS = 500_000_000
MAX_LIVE_ELEMENTS = 1_000_000_000
#: The flat buckets in which ZeRO-0 reduces gradients (``buffered_allreduce_fallback`` of runtime/engine.py).
REPLICATED_BUCKET_ELEMENTS = 500_000_000


@dataclass(frozen=True)
class Layout:
    """Bytes on one rank. ``gradients`` and ``buffers`` depend on how many elements' gradients are finished."""

    compute: Compute
    parameters: int  # what the model computes with, as long as it is not gathered
    masters: int  # fp32 weights beside the parameters
    optimizer: int
    gradients: Callable[[int], int]
    buffers: Callable[[int], int]  # gathered weights, buckets, copies for collectives
    host: int = 0  # in the host's memory: what is offloaded


@dataclass(frozen=True)
class Sizes:
    """The parameters of a model, in their order."""

    shapes: tuple[torch.Size, ...]
    block: int  # elements of one transformer block
    root: int  # elements outside the blocks

    @property
    def total(self) -> int:
        """Elements of all parameters."""
        return sum(map(math.prod, self.shapes))

    @property
    def largest(self) -> int:
        """Elements of the largest parameter, the embedding."""
        return max(map(math.prod, self.shapes))


@cache
def sizes_of(model: ModelConfig) -> Sizes:
    """Shapes from the real model, without memory."""
    with torch.device("meta"):
        built = GPT2(model)
    block = sum(parameter.numel() for parameter in built.h[0].parameters())
    shapes = tuple(parameter.shape for parameter in built.parameters())
    return Sizes(shapes, block, sum(map(math.prod, shapes)) - model.n_layer * block)


def layout_of(config: Config, plan: BatchPlan) -> Layout:
    """The layout of the config's backend."""
    sizes = sizes_of(config.model)
    is_bf16 = config.run.precision == "bf16"
    if config.backend.name == "ddp":
        return _ddp(sizes, plan, is_bf16=is_bf16)
    if config.backend.name == "fsdp":
        return _fsdp(sizes, plan, is_bf16=is_bf16, reshards=config.backend.fsdp.reshard_after_forward)
    zero = config.backend.deepspeed.get("zero_optimization", {})
    stages = {0: _zero0, 1: _zero1, 2: _zero2, 3: _zero3}
    return stages[int(zero.get("stage", 0))](sizes, plan, zero, is_bf16)


def _growing(total: int, sizes: Sizes) -> Callable[[int], int]:
    """Bytes that come one gradient after the other."""
    return lambda finished: total * finished // sizes.total


def _always(size: int) -> Callable[[int], int]:
    return lambda _finished: size


def _replicated(sizes: Sizes, *, is_bf16: bool) -> dict[str, Any]:
    return {
        "compute": "bf16_view" if is_bf16 else "autocast",
        "parameters": FP32 * sizes.total,
        "masters": 0,
        "optimizer": MOMENTS * sizes.total,
    }


def _ddp(sizes: Sizes, plan: BatchPlan, *, is_bf16: bool) -> Layout:
    """Gradients are parts of the buckets, from one step to the next."""
    whole = FP32 * sizes.total
    kept = plan.accumulation > 1 or plan.world_size > 1
    gradients = _always(whole) if kept else _growing(whole, sizes)
    return Layout(**_replicated(sizes, is_bf16=is_bf16), gradients=gradients, buffers=_always(0))


def _zero0(sizes: Sizes, plan: BatchPlan, _zero: dict[str, Any], is_bf16: bool) -> Layout:
    """Gradients are copied into flat buckets when all are finished."""
    whole = FP32 * sizes.total
    bucket = FP32 * min(sizes.total, REPLICATED_BUCKET_ELEMENTS) if plan.world_size > 1 else 0
    return Layout(
        **_replicated(sizes, is_bf16=is_bf16),
        gradients=_always(whole) if plan.accumulation > 1 else _growing(whole, sizes),
        buffers=lambda finished: bucket if finished == sizes.total else 0,
    )


def fsdp_shard_elements(shapes: Iterable[torch.Size], world_size: int) -> int:
    """Elements on rank 0: every parameter is cut along its rows, and each rank has room for the largest cut."""
    return sum(-(-shape[0] // world_size) * math.prod(shape[1:]) for shape in shapes)


def _fsdp(sizes: Sizes, plan: BatchPlan, *, is_bf16: bool, reshards: bool) -> Layout:
    """Gathered are the root's weights and those of a block and the next one, or all; gradients are reduced last."""
    shard = fsdp_shard_elements(sizes.shapes, plan.world_size)
    width = BF16 if is_bf16 else FP32
    accumulates = plan.accumulation > 1
    root = width * sizes.root
    blocks = width * (min(2 * sizes.block, sizes.total - sizes.root) if reshards else sizes.total - sizes.root)

    def gradients(finished: int) -> int:
        return FP32 * sizes.total if accumulates else FP32 * (shard * finished // sizes.total)

    def buffers(finished: int) -> int:
        """Gathered weights; and of a group whose gradients are finished these, and their copy for reduce-scatter."""
        if finished == 0:
            return root + blocks
        if finished == sizes.total:
            return root + 2 * FP32 * sizes.root
        return root + (blocks + 2 * FP32 * sizes.block if finished <= sizes.total - sizes.root else 0)

    return Layout(
        compute="bf16_weights" if is_bf16 else "autocast",
        parameters=FP32 * shard,
        masters=0,
        optimizer=MOMENTS * shard,
        gradients=gradients,
        buffers=buffers,
    )


def zero_partition_elements(shapes: Iterable[torch.Size], world_size: int) -> int:
    """Elements of a rank under stage 1 and 2: each of the two groups end to end, cut in W parts of even length."""
    groups = _groups(shapes)
    return sum(2 * -(-sum(map(math.prod, group)) // (2 * world_size)) for group in groups)


def zero3_partition_elements(shapes: Iterable[torch.Size], world_size: int) -> int:
    """Elements of a rank under stage 3: each parameter cut in W equal parts, the last one padded."""
    return sum(-(-math.prod(shape) // world_size) for shape in shapes)


def _groups(shapes: Iterable[torch.Size]) -> tuple[list[torch.Size], list[torch.Size]]:
    """What decays and what does not, as ``pipeline.backends.optimizer.parameter_groups`` has them."""
    every = list(shapes)
    return [shape for shape in every if len(shape) >= 2], [shape for shape in every if len(shape) < 2]


def whole_parameters_of_partition(shapes: Iterable[torch.Size], world_size: int) -> int:
    """Elements of all parameters that reach into one rank's partition, of the rank with most (stages 1 and 2)."""
    largest = 0
    for group in _groups(shapes):
        counts = list(map(math.prod, group))
        partition = 2 * -(-sum(counts) // (2 * world_size))
        reaching = [0] * world_size
        start = 0
        for count in counts:
            for rank in range(start // partition, (start + count - 1) // partition + 1):
                reaching[rank] += count
            start += count
        largest += max(reaching)
    return largest


def _buckets(zero: dict[str, Any], width: int) -> int:
    """Two contiguous buffers where reduction overlaps with the backward pass, else one."""
    if not zero.get("contiguous_gradients", True):
        return 0
    count = 2 if zero.get("overlap_comm", False) else 1
    return count * width * int(zero.get("reduce_bucket_size", REDUCE_BUCKET_ELEMENTS))


def _zero1(sizes: Sizes, plan: BatchPlan, zero: dict[str, Any], is_bf16: bool) -> Layout:
    """Moments and masters divided; gradients are whole between micro-steps."""
    shard = zero_partition_elements(sizes.shapes, plan.world_size)
    accumulates = plan.accumulation > 1
    if is_bf16:  # DeepSpeed's BF16_Optimizer: fp32 gradients of all parameters, beside those that are being computed
        new = _always(BF16 * sizes.total) if accumulates else _growing(BF16 * sizes.total, sizes)
        return Layout(
            compute="bf16_weights",
            parameters=BF16 * sizes.total,
            masters=FP32 * shard,
            optimizer=MOMENTS * shard,
            gradients=lambda finished: FP32 * sizes.total + new(finished),
            buffers=_always(0),
        )
    reaching = FP32 * whole_parameters_of_partition(sizes.shapes, plan.world_size)
    return Layout(
        compute="autocast",
        parameters=FP32 * sizes.total,
        masters=FP32 * shard,
        optimizer=MOMENTS * shard,
        gradients=_always(FP32 * sizes.total) if accumulates else _growing(reaching, sizes),
        buffers=lambda finished: FP32 * shard if finished == sizes.total else _buckets(zero, FP32),
    )


def _zero2(sizes: Sizes, plan: BatchPlan, zero: dict[str, Any], is_bf16: bool) -> Layout:
    """Gradients divided too: with bf16 weights exactly, else those of all parameters that reach into the partition."""
    shard = zero_partition_elements(sizes.shapes, plan.world_size)
    width = BF16 if is_bf16 else FP32
    kept = FP32 * (shard if is_bf16 else whole_parameters_of_partition(sizes.shapes, plan.world_size))
    parameters, masters, optimizer = width * sizes.total, FP32 * shard, MOMENTS * shard
    buckets = _buckets(zero, width)
    if not offloads(zero, "offload_optimizer"):
        return Layout(
            compute="bf16_weights" if is_bf16 else "autocast",
            parameters=parameters,
            masters=masters,
            optimizer=optimizer,
            gradients=_always(kept) if plan.accumulation > 1 else _growing(kept, sizes),
            buffers=lambda finished: FP32 * shard if finished == sizes.total else buckets,
        )
    accumulated = kept if plan.accumulation > 1 else 0
    host = masters + optimizer + FP32 * shard + width * shard + width * sizes.largest + accumulated
    return Layout(
        compute="bf16_weights" if is_bf16 else "autocast",
        parameters=parameters,
        masters=0,
        optimizer=0,
        gradients=_always(0),
        buffers=_always(buckets + width * sizes.largest),
        host=host,
    )


def _zero3(sizes: Sizes, plan: BatchPlan, zero: dict[str, Any], is_bf16: bool) -> Layout:
    """All divided. What was gathered stays as long as ``stage3_max_live_parameters`` allows, which is long."""
    shard = zero3_partition_elements(sizes.shapes, plan.world_size)
    width = BF16 if is_bf16 else FP32
    live = min(sizes.total, int(zero.get("stage3_max_live_parameters", MAX_LIVE_ELEMENTS)))
    bucket = FP32 * int(zero.get("reduce_bucket_size", REDUCE_BUCKET_ELEMENTS))
    parameters, state = width * shard, (FP32 + MOMENTS) * shard
    offloads_state = offloads(zero, "offload_optimizer")
    offloads_parameters = offloads(zero, "offload_param")
    host = (state + 2 * FP32 * shard if offloads_state else 0) + (parameters if offloads_parameters else 0)
    return Layout(
        compute="bf16_weights" if is_bf16 else "autocast",
        parameters=0 if offloads_parameters else parameters,
        masters=0 if offloads_state else FP32 * shard,
        optimizer=0 if offloads_state else MOMENTS * shard,
        gradients=_always(0 if offloads_state else FP32 * shard),
        buffers=_always(width * live + bucket),
        host=host,
    )


def offloads(zero: dict[str, Any], key: str) -> bool:
    return zero.get(key, {}).get("device", "none") != "none"
