"""List the collectives that a backend issues during a step, and the computation between them.

A micro-step is a list of stages. The forward pass and the backward pass each have a stage for the embeddings, for each
block, and for the output layer. A stage begins when its weights are gathered. A gradient can be reduced at the end of
the stage that finishes it. The token embedding and the output layer share one weight, whose gradient is finished last.

The list describes the backends with torch 2.13 and DeepSpeed 0.19.8.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from pipeline.config.schema import Config, ModelConfig
from pipeline.data.batch_plan import BatchPlan
from pipeline.model.gpt2 import flops_per_token
from pipeline.model.muon_matrices import Matrix, divide_into_batches, muon_matrices
from pipeline.planning.communication import Collective, Group, Kind
from pipeline.planning.memory import BF16, FP32, REDUCE_BUCKET_ELEMENTS, REPLICATED_BUCKET_ELEMENTS, Sizes, sizes_of

MAX_REUSE_ELEMENTS = 1_000_000_000  # DeepSpeed's default of ``stage3_max_reuse_distance``
MIB = 1 << 20


@dataclass(frozen=True)
class Stage:
    """A piece of the computation of a micro-step, such as the forward pass of one block."""

    share: float  # of the FLOPs of the forward and backward pass
    elements: int  # of the weights with which this stage computes
    finished: tuple[int, ...] = ()  # the sizes of parameters; the stage finishes their gradients
    gathers: tuple[Collective, ...] = ()  # must finish before the stage begins
    reductions: tuple[Collective, ...] = ()  # start when the stage has ended


@dataclass(frozen=True)
class StepCollectives:
    """The collectives of one step."""

    first: list[Stage]  # the first micro-step
    middle: list[Stage]  # each micro-step between the first and the last
    last: list[Stage]  # the last micro-step; it is also the first one if there is only one
    accumulation: int
    after: list[Collective]  # after the last backward pass, one by one

    def micro_steps(self) -> Iterator[tuple[int, list[Stage]]]:
        """Yield (number of micro-steps, their stages) for the first, the middle and the last micro-steps."""
        if self.accumulation > 1:
            yield 1, self.first
            yield self.accumulation - 2, self.middle
        yield 1, self.last

    @property
    def sent_bytes(self) -> int:
        """Return the number of bytes that a rank sends per step."""
        within = sum(
            count * collective.sent_bytes
            for count, stages in self.micro_steps()
            for stage in stages
            for collective in (*stage.gathers, *stage.reductions)
        )
        return round(within + sum(collective.sent_bytes for collective in self.after))


def step_collectives(config: Config, plan: BatchPlan) -> StepCollectives:
    issue = _Issuer(config, plan)
    accumulation = plan.accumulation
    return StepCollectives(
        first=issue.micro_step(is_first=True, is_last=accumulation == 1),
        middle=issue.micro_step(is_first=False, is_last=False),
        last=issue.micro_step(is_first=accumulation == 1, is_last=True),
        accumulation=accumulation,
        after=[*issue.after_backward(), *_muon_collectives(config, plan.world_size)],
    )


def muon_matrices_of(config: Config) -> list[Matrix]:
    """Return the matrices that Muon updates, or an empty list for AdamW."""
    if config.optimizer.name != "muon":
        return []
    return list(muon_matrices(sizes_of(config.model).shapes, split_qkv=config.optimizer.muon.split_qkv))


def _muon_collectives(config: Config, ranks: int) -> Iterator[Collective]:
    """Yield the all-to-alls that send Muon's matrices to their owners, and the updates back."""
    width = FP32 if config.run.precision == "fp32" else BF16
    group = config.backend.ranks_per_copy(ranks)
    matrices = muon_matrices_of(config)
    for batch in divide_into_batches(matrices, ranks) if matrices else []:
        size = width * sum(matrix.numel for matrix in batch)
        # A rank holds 1/group of the elements, and sends group/ranks of them to the owners in its group. Each owner
        # then sends the updates of its matrices to all other ranks that hold the elements.
        yield Collective("all_to_all", size // ranks, Group(group))
        yield Collective("all_to_all", size // group, Group(ranks))


class _Issuer:
    """Returns the collectives of one config."""

    def __init__(self, config: Config, plan: BatchPlan) -> None:
        self.backend = config.backend
        self.sizes = sizes_of(config.model)
        self.forward, self.backward = _passes(config.model, self.sizes, plan.seq_len)
        self.world = Group(plan.world_size)
        self.is_bf16 = config.run.precision == "bf16"
        self.weight_width = BF16 if self.is_bf16 else FP32
        self.gradient_width = BF16 if self.backend.reduce_dtype == "bf16" else FP32
        self.stage = self.backend.zero_stage if self.backend.name == "deepspeed" else None

    def micro_step(self, *, is_first: bool, is_last: bool) -> list[Stage]:
        if self.backend.name == "fsdp":
            return self._fsdp(is_first=is_first, is_last=is_last)
        stages = [*self.forward, *self.backward]
        if self.backend.name == "ddp" and is_last:
            limit = self.backend.ddp.bucket_cap_mb * MIB // FP32
            return self._reduce_in_buckets(stages, "all_reduce", limit, is_full_after=True)
        if self.stage == 3:
            stages = self._zero3_gathers(stages, is_first=is_first)
        # In bf16, DeepSpeed's BF16_Optimizer of stage 1 reduces gradients after the backward pass.
        if self.stage == 3 or self.stage == 2 or (self.stage == 1 and is_last and not self.is_bf16):
            limit = int(self.backend.zero.get("reduce_bucket_size", REDUCE_BUCKET_ELEMENTS))
            kind: Kind = "reduce_scatter" if self.stage == 3 or not self._all_reduces_buckets else "all_reduce"
            return self._reduce_in_buckets(stages, kind, limit, is_full_after=False)
        return stages

    @property
    def _all_reduces_buckets(self) -> bool:
        """Return whether ZeRO stages 1 and 2 all-reduce a bucket. Otherwise, they reduce each partition to its rank."""
        zero = self.backend.zero
        return bool(zero.get("use_multi_rank_bucket_allreduce", True) or not zero.get("reduce_scatter", True))

    def after_backward(self) -> Iterator[Collective]:
        if self.stage == 0 or (self.stage == 1 and self.is_bf16):
            for elements in _divide(self.sizes.total, REPLICATED_BUCKET_ELEMENTS):
                yield Collective("all_reduce", self.gradient_width * elements, self.world)
        if self.stage in (1, 2):
            yield Collective("all_gather", self.weight_width * self.sizes.total, self.world)

    def _fsdp(self, *, is_first: bool, is_last: bool) -> list[Stage]:
        """Return the stages of FSDP2. The weights outside the blocks are gathered once per step."""
        shard = Group(self.backend.ranks_per_copy(self.world.size))
        copies = Group(self.world.size // shard.size, stride=shard.size)
        reshards = self.backend.fsdp.reshard_after_forward

        def gather(stage: Stage, *, gathers: bool) -> Stage:
            size = self.weight_width * stage.elements
            return replace(stage, gathers=(Collective("all_gather", size, shard),) if gathers and size else ())

        def reduce(stage: Stage) -> Stage:
            size = self.gradient_width * sum(stage.finished)
            within = Collective("reduce_scatter", size, shard)
            return replace(stage, reductions=(within, Collective("all_reduce", size // shard.size, copies)))

        embeddings, *blocks, output = self.forward
        stages = [
            gather(embeddings, gathers=is_first),
            *(gather(stage, gathers=is_first or reshards) for stage in blocks),
            output,
        ]
        for stage in self.backward:
            is_block = stage.elements == self.sizes.block
            stage = gather(stage, gathers=is_block and reshards)
            stages.append(reduce(stage) if is_last and stage.finished else stage)
        return stages

    def _zero3_gathers(self, stages: Sequence[Stage], *, is_first: bool) -> list[Stage]:
        """Add the gathers of ZeRO-3. With hpZ, only the first gather of a weight per step includes all ranks.

        DeepSpeed keeps gathered weights that are used again within ``stage3_max_reuse_distance`` elements.
        """
        reach = int(self.backend.zero.get("stage3_max_reuse_distance", MAX_REUSE_ELEMENTS))
        secondary = Group(self.backend.hpz_group_size) if self.backend.hpz_group_size > 1 else self.world
        last_use: dict[int, int] = {}  # the number of a module -> the elements that were used up to its last use
        result, used = [], 0
        for stage, module in zip(stages, self._modules(), strict=True):
            gathers: tuple[Collective, ...] = ()
            if module not in last_use or used - last_use[module] >= reach:
                group = self.world if is_first and module not in last_use else secondary
                gathers = (Collective("all_gather", self.weight_width * stage.elements, group),)
            used += stage.elements
            last_use[module] = used
            result.append(replace(stage, gathers=gathers))
        return result

    def _modules(self) -> list[int]:
        """Return the module of each stage as a number: 0 for the root, and 1, 2, ... for blocks."""
        blocks = list(range(1, len(self.forward) - 1))
        return [0, *blocks, 0, 0, *reversed(blocks), 0]

    def _reduce_in_buckets(
        self, stages: Sequence[Stage], kind: Kind, limit: int, *, is_full_after: bool
    ) -> list[Stage]:
        """Add the reductions of buckets that are filled with finished gradients.

        Args:
            is_full_after: whether a bucket includes the gradient that reaches the limit. Otherwise, the bucket is
                reduced before the gradient that would exceed the limit.
        """
        result, bucket = [], 0
        for stage in stages:
            full = []
            for elements in stage.finished:
                if not is_full_after and bucket and bucket + elements > limit:
                    full.append(bucket)
                    bucket = 0
                bucket += elements
                if is_full_after and bucket >= limit:
                    full.append(bucket)
                    bucket = 0
            if stage is stages[-1] and bucket:
                full.append(bucket)
            reductions = tuple(Collective(kind, self.gradient_width * elements, self.world) for elements in full)
            result.append(replace(stage, reductions=reductions))
        return result


def _passes(model: ModelConfig, sizes: Sizes, seq_len: int) -> tuple[list[Stage], list[Stage]]:
    """Return the stages of the forward and the backward pass. The backward pass includes recomputation."""
    head_share = 6 * sizes.shapes["wte.weight"].numel() / flops_per_token(model, seq_len)
    block_share = (1 - head_share) / model.n_layer
    of_block = tuple(shape.numel() for name, shape in sizes.shapes.items() if name.startswith("h.0."))
    of_root = tuple(shape.numel() for name, shape in sizes.shapes.items() if not name.startswith("h."))
    forward = [
        Stage(0.0, sizes.root),
        *(Stage(block_share / 3, sizes.block) for _ in range(model.n_layer)),
        Stage(head_share / 3, sizes.root),
    ]
    backward = [
        Stage(head_share * 2 / 3, sizes.root),
        *(
            Stage(block_share * (3 if model.recomputes_block(i) else 2) / 3, sizes.block, of_block[::-1])
            for i in reversed(range(model.n_layer))
        ),
        Stage(0.0, sizes.root, of_root[::-1]),
    ]
    return forward, backward


def _divide(total: int, limit: int) -> list[int]:
    return [min(limit, total - start) for start in range(0, total, limit)]
