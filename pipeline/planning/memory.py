"""Compute how many bytes of memory a rank needs for weights, masters, optimizer state, gradients and buffers.

The *compute weights* are the weights that the model computes with. *Masters* are fp32 weights that some backends also
keep, for the optimizer to update. All results are for the rank that needs the most memory.

The formulas describe the backends with torch 2.13 and DeepSpeed 0.19.8. Their sources are torch's reducer (ddp) and
``fully_shard`` (fsdp), and these files of DeepSpeed: ``runtime/engine.py`` (zero0), ``zero/stage_1_and_2.py`` (zero1,
zero2) and ``zero/stage3.py`` (zero3). ``make plan-check`` compares the results with measurements.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache, cached_property

import torch

from pipeline.config.schema import BackendConfig, Config, ModelConfig
from pipeline.data.batch_plan import BatchPlan
from pipeline.hardware.pinned_buffers import pinned_size
from pipeline.model.gpt2 import GPT2
from pipeline.model.muon_matrices import divide_into_batches, exchange_elements, muon_matrices
from pipeline.model.parameter_state import state_names_of
from pipeline.planning.activations import Compute

FP32, BF16 = 4, 2  # bytes per element

#: DeepSpeed's defaults, in elements (runtime/zero/config.py of 0.19.8).
REDUCE_BUCKET_ELEMENTS = 500_000_000
MAX_LIVE_ELEMENTS = 1_000_000_000
#: The flat buckets in which ZeRO-0 reduces gradients (``buffered_allreduce_fallback`` of runtime/engine.py).
REPLICATED_BUCKET_ELEMENTS = 500_000_000


@dataclass(frozen=True)
class Layout:
    """The bytes of memory that one rank needs for each kind of state.

    ``gradients`` and ``buffers`` change during the backward pass, so they are functions. Their argument is the number
    of elements whose gradients are finished.
    """

    compute: Compute
    parameters: int  # the weights that the model computes with, while they are not gathered
    masters: int  # fp32 weights in addition to the parameters
    optimizer: int
    gradients: Callable[[int], int]
    buffers: Callable[[int], int]  # gathered weights, buckets, copies for collectives
    host: int = 0  # bytes of offloaded state in the host's memory


@dataclass(frozen=True)
class Sizes:
    """The sizes of a model's parameters, in elements."""

    shapes: dict[str, torch.Size]  # of all parameters, by canonical name
    total: int
    block: int  # elements of one transformer block
    root: int  # elements outside the blocks


@dataclass(frozen=True)
class _Case:
    """The values that a layout depends on."""

    sizes: Sizes
    world_size: int
    accumulates: bool  # more than one micro-step per optimizer step
    is_bf16: bool
    backend: BackendConfig
    config: Config
    pins_host_memory: bool

    def pinned(self, size: int, *, always: bool = False) -> int:
        """Return the bytes that a buffer takes in host memory. Pinning rounds ``size`` up to a power of two.

        Args:
            always: whether DeepSpeed ignores ``offload_optimizer.pin_memory`` for this buffer.
        """
        pins = always or self.backend.zero.get("offload_optimizer", {}).get("pin_memory", True)
        return pinned_size(size) if self.pins_host_memory and pins else size

    @property
    def width(self) -> int:
        """Return the bytes per element of the weights that the model computes with."""
        return BF16 if self.is_bf16 else FP32

    def reduced_copy(self, elements: int) -> int:
        """Return the bytes of the bf16 copy of ``elements`` gradients that the rank sends, or 0 if it sends fp32."""
        return BF16 * elements if self.backend.reduces_in_bf16(self.world_size) else 0

    @property
    def compute(self) -> Compute:
        """Return the kind of compute weights in FSDP2 and ZeRO-1 to ZeRO-3. DDP and ZeRO-0 differ in ``bf16``."""
        return "bf16_weights" if self.is_bf16 else "autocast"

    def growing(self, total: int) -> Callable[[int], int]:
        """Return a function for bytes that grow from 0 to ``total`` as gradients are finished."""
        return lambda finished: total * finished // self.sizes.total

    @cached_property
    def state_widths(self) -> dict[str, int]:
        """Return the bytes of optimizer state per element, by parameter name."""
        names = state_names_of(self.sizes.shapes, self.config)
        return {name: FP32 * len(kinds) for name, kinds in names.items()}

    def state_bytes(self, shard: Callable[[torch.Size], int]) -> int:
        """Return the bytes of optimizer state if a rank holds ``shard(shape)`` elements of each parameter."""
        return sum(width * shard(self.sizes.shapes[name]) for name, width in self.state_widths.items())

    def partitions(self) -> Iterator[tuple[list[int], int, int]]:
        """Yield the parameter sizes, elements per rank and state bytes per element of each optimizer group.

        The number of elements per rank is rounded up to a multiple of 2.
        """
        groups: dict[tuple[bool, int], list[int]] = {}
        for name, shape in self.sizes.shapes.items():
            groups.setdefault((len(shape) >= 2, self.state_widths[name]), []).append(math.prod(shape))
        for (_, state_width), group in groups.items():
            yield group, 2 * -(-sum(group) // (2 * self.world_size)), state_width


@cache
def sizes_of(model: ModelConfig) -> Sizes:
    """Return the sizes of the model's parameters, without allocating memory for them."""
    with torch.device("meta"):
        built = GPT2(model)
    block = sum(parameter.numel() for parameter in built.h[0].parameters())
    shapes = {name: parameter.shape for name, parameter in built.named_parameters()}
    total = sum(map(math.prod, shapes.values()))
    return Sizes(shapes, total, block, total - model.n_layer * block)


def layout_of(config: Config, plan: BatchPlan, *, pins_host_memory: bool = False) -> Layout:
    """Return the memory that one rank needs for each kind of state.

    Args:
        pins_host_memory: whether buffers in host memory are pinned, as in training on GPUs.
    """
    backend, is_bf16 = config.backend, config.run.precision == "bf16"
    sizes, accumulates = sizes_of(config.model), plan.accumulation > 1
    case = _Case(sizes, plan.world_size, accumulates, is_bf16, backend, config, pins_host_memory)
    if backend.name == "deepspeed":
        layout = (_zero0, _zero1, _zero2, _zero3)[backend.zero_stage](case)
    else:
        layout = _ddp(case) if backend.name == "ddp" else _fsdp(case)
    exchanged = exchange_bytes(config, plan.world_size)

    def buffers(finished: int) -> int:
        return layout.buffers(finished) + (exchanged if finished == case.sizes.total else 0)

    return replace(layout, buffers=buffers)


def checkpoint_bytes(config: Config) -> int:
    """Return the size of a checkpoint in bytes."""
    sizes = sizes_of(config.model)
    names = state_names_of(sizes.shapes, config)
    return sum(FP32 * (1 + len(names[name])) * math.prod(shape) for name, shape in sizes.shapes.items())


def exchange_bytes(config: Config, world_size: int) -> int:
    """Return the bytes that one rank needs to exchange and orthogonalize Muon's matrices, or 0 for AdamW."""
    if config.optimizer.name != "muon":
        return 0
    shapes = sizes_of(config.model).shapes
    matrices = list(muon_matrices(shapes, split_qkv=config.optimizer.muon.split_qkv))
    ranks_per_copy = config.backend.ranks_per_copy(world_size)
    width = FP32 if config.run.precision == "fp32" else BF16
    batches = divide_into_batches(matrices, world_size)
    return width * max(exchange_elements(batch, world_size, ranks_per_copy) for batch in batches)


def _always(size: int) -> Callable[[int], int]:
    return lambda _finished: size


def _replicated(case: _Case, gradients: Callable[[int], int], buffers: Callable[[int], int]) -> Layout:
    total = case.sizes.total
    compute: Compute = "bf16_view" if case.is_bf16 else "autocast"
    return Layout(compute, FP32 * total, 0, case.state_bytes(math.prod), gradients, buffers)


def _ddp(case: _Case) -> Layout:
    """Return the layout of DDP: gradients are views of the buckets, which stay allocated between steps."""
    whole = FP32 * case.sizes.total
    stays = case.accumulates or case.world_size > 1
    gradients = _always(whole) if stays else case.growing(whole)
    return _replicated(case, gradients, buffers=case.reduced_copy)  # all copies exist if the network is slow


def _zero0(case: _Case) -> Layout:
    """Return the layout of ZeRO-0: after all gradients are finished, they are copied into flat buckets."""
    total = case.sizes.total
    elements = min(total, REPLICATED_BUCKET_ELEMENTS)
    bucket = FP32 * elements + case.reduced_copy(elements) if case.world_size > 1 else 0
    return _replicated(
        case,
        gradients=_always(FP32 * total) if case.accumulates else case.growing(FP32 * total),
        buffers=lambda finished: bucket if finished == total else 0,
    )


def _fsdp(case: _Case) -> Layout:
    """Return the layout of FSDP2: the ranks of a shard group divide the rows of each parameter.

    Each rank allocates the largest shard. The root and two blocks are gathered at a time. Without resharding, all
    blocks are gathered.
    """
    sizes = case.sizes
    group = case.backend.ranks_per_copy(case.world_size)

    def shard_of(shape: torch.Size) -> int:
        return -(-shape[0] // group) * math.prod(shape[1:])

    shard = sum(map(shard_of, sizes.shapes.values()))
    in_blocks = sizes.total - sizes.root
    root = case.width * sizes.root
    blocks = case.width * (min(2 * sizes.block, in_blocks) if case.backend.fsdp.reshard_after_forward else in_blocks)

    def gradients(finished: int) -> int:
        return FP32 * sizes.total if case.accumulates else FP32 * (shard * finished // sizes.total)

    def buffers(finished: int) -> int:
        """Return the bytes of three things together.

        These are the gathered weights, the finished gradients of a group, and the copy of these gradients for the
        reduce-scatter.
        """
        if finished == 0:
            return root + blocks
        if finished == sizes.total:
            return root + 2 * FP32 * sizes.root + case.reduced_copy(sizes.root)
        in_block = 2 * FP32 * sizes.block + case.reduced_copy(sizes.block)
        return root + (blocks + in_block if finished <= in_blocks else 0)

    return Layout(case.compute, FP32 * shard, 0, case.state_bytes(shard_of), gradients, buffers)


def _overlapping_bytes(case: _Case, bytes_of: Callable[[int], int]) -> int:
    """Return the bytes of the rank that has the most.

    A rank's bytes are the bytes of all parameters that overlap its partition. A parameter counts as a whole.

    Args:
        bytes_of: returns the bytes of a parameter from its number of elements.
    """
    largest = 0
    for group, partition, _ in case.partitions():
        overlapping = [0] * case.world_size
        start = 0
        for count in group:
            for rank in range(start // partition, (start + count - 1) // partition + 1):
                overlapping[rank] += bytes_of(count)
            start += count
        largest += max(overlapping)
    return largest


def _reduce_buckets(case: _Case) -> int:
    """Return the bytes of the contiguous buffers.

    There are two buffers if reductions overlap with the backward pass, otherwise one.
    """
    zero = case.backend.zero
    if not zero.get("contiguous_gradients", True):
        return 0
    count = 2 if zero.get("overlap_comm", False) else 1
    elements = int(zero.get("reduce_bucket_size", REDUCE_BUCKET_ELEMENTS))
    return count * case.width * elements + case.reduced_copy(min(elements, case.sizes.total))


def _zero1(case: _Case) -> Layout:
    """Return the layout of ZeRO-1: moments and master weights are partitioned, accumulated gradients are not."""
    sizes = case.sizes
    shard = sum(partition for _, partition, _ in case.partitions())
    state = sum(partition * width for _, partition, width in case.partitions())
    if case.is_bf16:
        # DeepSpeed's BF16_Optimizer keeps fp32 gradients of all parameters in addition to the bf16 gradients.
        new = _always(BF16 * sizes.total) if case.accumulates else case.growing(BF16 * sizes.total)
        gradients, buffers = lambda finished: FP32 * sizes.total + new(finished), _always(0)
    else:
        overlapping = _overlapping_bytes(case, lambda count: FP32 * count)
        gradients = _always(FP32 * sizes.total) if case.accumulates else case.growing(overlapping)
        buffers = _shard_after_backward(case, shard)
    return Layout(case.compute, case.width * sizes.total, FP32 * shard, state, gradients, buffers)


def _shard_after_backward(case: _Case, shard: int) -> Callable[[int], int]:
    """Return a function that gives the bytes of buffers.

    During the backward pass, these are buckets. After it, they are the fp32 gradients of the partition.
    """
    buckets = _reduce_buckets(case)
    return lambda finished: FP32 * shard if finished == case.sizes.total else buckets


def _zero2(case: _Case) -> Layout:
    """Return the layout of ZeRO-2: as ZeRO-1, with partitioned gradients.

    With bf16 weights, a rank keeps the gradients of its partition on the device, even with offload. With fp32 weights,
    a rank keeps the gradients of all parameters that overlap its partition. With fp32 weights and offload, these
    gradients accumulate in host memory.
    """
    sizes, width = case.sizes, case.width
    shard = sum(partition for _, partition, _ in case.partitions())
    state = sum(partition * width for _, partition, width in case.partitions())
    kept = FP32 * shard if case.is_bf16 else _overlapping_bytes(case, lambda count: FP32 * count)
    gradients = _always(kept) if case.accumulates else case.growing(kept)
    if not case.backend.offloads("optimizer"):
        buffers = _shard_after_backward(case, shard)
        return Layout(case.compute, width * sizes.total, FP32 * shard, state, gradients, buffers)
    accumulates_on_host = case.accumulates and not case.is_bf16
    accumulated = _overlapping_bytes(case, lambda count: case.pinned(FP32 * count)) if accumulates_on_host else 0
    largest = width * max(map(math.prod, sizes.shapes.values()))
    return Layout(
        compute=case.compute,
        parameters=width * sizes.total,
        masters=0,
        optimizer=0,
        gradients=gradients if case.is_bf16 else _always(0),
        buffers=_always(_reduce_buckets(case) + largest),
        host=state + _pinned_partitions(case) + case.pinned(largest) + accumulated,
    )


def _pinned_partitions(case: _Case) -> int:
    """Return the bytes of masters, master gradients and compute weights that ZeRO-2 keeps on the host."""
    partitions = [partition for _, partition, _ in case.partitions()]
    return sum(2 * case.pinned(FP32 * count) + case.pinned(case.width * count) for count in partitions)


def _zero3(case: _Case) -> Layout:
    """Return the layout of ZeRO-3: each parameter is padded and divided into one shard per rank.

    Up to ``stage3_max_live_parameters`` weights stay gathered. With hpZ, each group of ranks also holds a secondary
    copy of all weights.
    """
    zero, group = case.backend.zero, case.backend.hpz_group_size

    def shard_of(shape: torch.Size) -> int:
        return -(-math.prod(shape) // case.world_size)

    shard = sum(map(shard_of, case.sizes.shapes.values()))
    live = min(case.sizes.total, int(zero.get("stage3_max_live_parameters", MAX_LIVE_ELEMENTS)))
    elements = int(zero.get("reduce_bucket_size", REDUCE_BUCKET_ELEMENTS))
    bucket = FP32 * elements + case.reduced_copy(min(elements, case.sizes.total))
    secondary = case.width * shard * case.world_size // group if group > 1 else 0
    parameters, state = case.width * shard + secondary, case.state_bytes(shard_of)
    offloads_state, offloads_parameters = case.backend.offloads("optimizer"), case.backend.offloads("param")
    return Layout(
        compute=case.compute,
        parameters=0 if offloads_parameters else parameters,
        masters=0 if offloads_state else FP32 * shard,
        optimizer=0 if offloads_state else state,
        gradients=_always(0 if offloads_state else FP32 * shard),
        buffers=_always(case.width * live + bucket),
        host=(state + FP32 * shard + 2 * case.pinned(FP32 * shard) if offloads_state else 0)
        + (case.pinned(parameters, always=True) if offloads_parameters else 0),
    )
