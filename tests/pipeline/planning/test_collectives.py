"""The collectives that each backend issues in a step, for GPT-2 124M."""

from __future__ import annotations

import math

import pytest

from pipeline.config.loading import load_config
from pipeline.config.schema import Config
from pipeline.data.batch_plan import plan_batch
from pipeline.model.gpt2 import allocate_model, flops_per_token
from pipeline.planning.collectives import Stage, StepCollectives, step_collectives
from pipeline.planning.communication import Collective, Group
from tests.support.runs import CONFIGS

ZERO = "backend.deepspeed.zero_optimization"
MODEL = load_config([CONFIGS / "ddp.json"]).model
BLOCK_SHAPES = [parameter.shape for parameter in allocate_model(MODEL, "meta").h[0].parameters()]
WTE, WPE, BLOCK, LAST_NORM = 50304 * 768, 1024 * 768, sum(map(math.prod, BLOCK_SHAPES)), 2 * 768
ROOT = WTE + WPE + LAST_NORM
ALL = ROOT + 12 * BLOCK
RANKS = 16


def collectives_of(backend: str, *overrides: str, accumulation: int = 1) -> StepCollectives:
    tokens = f"batch.tokens_per_step={RANKS * 16 * 1024 * accumulation}"
    config: Config = load_config([CONFIGS / f"{backend}.json"], [tokens, *overrides])
    return step_collectives(config, plan_batch(config, RANKS))


def gathers_of(stages: list[Stage]) -> list[Collective]:
    return [collective for stage in stages for collective in stage.gathers]


def reductions_of(stages: list[Stage]) -> list[Collective]:
    return [collective for stage in stages for collective in stage.reductions]


def test_stages_divide_the_flops_of_a_micro_step() -> None:
    for checkpointing, expected in (("false", 1.0), ("true", 1 + (1 - 6 * WTE / flops_per_token(MODEL, 1024)) / 3)):
        step = collectives_of("ddp", f"model.activation_checkpointing={checkpointing}")
        assert sum(stage.share for stage in step.last) == pytest.approx(expected, rel=1e-3)


def test_ddp_reduces_buckets_in_the_last_micro_step() -> None:
    """A bucket of 25 MiB is full with the gradient that reaches this size. The embedding is the last gradient."""
    step = collectives_of("ddp", accumulation=4)
    assert not reductions_of(step.first) and not reductions_of(step.middle) and not step.after
    sizes = [collective.size for collective in reductions_of(step.last)]
    assert sum(sizes) == 4 * ALL
    assert all(size >= 25 << 20 for size in sizes[:-1])
    last = step.last[-1].reductions
    assert len(last) == 1 and last[0].size >= 4 * WTE, "no computation is left that could overlap with it"
    assert last[0].group == Group(RANKS)


@pytest.mark.parametrize(("reshards", "gathered"), [("true", (25, 24, 24)), ("false", (13, 0, 0))])
def test_fsdp_gathers_blocks_per_micro_step_and_the_root_once(reshards: str, gathered: tuple[int, int, int]) -> None:
    step = collectives_of("fsdp", f"backend.fsdp.reshard_after_forward={reshards}", accumulation=4)
    assert tuple(len(gathers_of(stages)) for stages in (step.first, step.middle, step.last)) == gathered
    assert sum(collective.size for collective in gathers_of(step.first)[:13]) == 4 * ALL


def test_fsdp_reduces_within_groups_and_then_between_them() -> None:
    step = collectives_of("fsdp", "backend.fsdp.shard_group_size=8", "run.precision=bf16")
    assert {collective.group for collective in gathers_of(step.last)} == {Group(8)}
    assert gathers_of(step.last)[1].size == 2 * BLOCK
    assert step.last[-1].reductions == (
        Collective("reduce_scatter", 4 * ROOT, Group(8)),
        Collective("all_reduce", 4 * ROOT // 8, Group(2, stride=8)),
    )


@pytest.mark.parametrize("backend", ["zero1", "zero2"])
def test_zero_1_and_2_all_reduce_buckets_and_gather_weights(backend: str) -> None:
    """A bucket of 50 million elements takes no gradient that exceeds this size. Stage 2 reduces per micro-step."""
    step = collectives_of(backend, accumulation=2)
    assert bool(reductions_of(step.first)) == (backend == "zero2")
    reduced = reductions_of(step.last)
    assert {collective.kind for collective in reduced} == {"all_reduce"}
    assert all(collective.size <= 4 * 50_000_000 for collective in reduced)
    assert sum(collective.size for collective in reduced) == 4 * ALL
    assert step.after == [Collective("all_gather", 4 * ALL, Group(RANKS))]


@pytest.mark.parametrize("backend", ["ddp", "fsdp", "zero0", "zero1", "zero2", "zero3"])
@pytest.mark.parametrize("precision", ["amp_bf16", "bf16"])
def test_reductions_in_bf16_send_half_the_bytes(backend: str, precision: str) -> None:
    """All-reduces send twice as many bytes as reduce-scatters. Gathers of weights do not change."""
    fp32, bf16 = (
        collectives_of(backend, f"run.precision={precision}", f"backend.reduce_dtype={dtype}").sent_bytes
        for dtype in ("fp32", "bf16")
    )
    sends = 1 if backend in ("fsdp", "zero3") else 2
    assert fp32 - bf16 == pytest.approx(sends * 2 * ALL * (RANKS - 1) / RANKS)


def test_zero_1_in_bf16_reduces_after_the_backward_pass() -> None:
    step = collectives_of("zero1", "run.precision=bf16")
    assert not reductions_of(step.last)
    assert [(collective.kind, collective.size) for collective in step.after] == [
        ("all_reduce", 4 * ALL),
        ("all_gather", 2 * ALL),
    ]


def test_zero_3_keeps_weights_that_are_needed_again_soon() -> None:
    """The output layer is used twice in a row. Between the two uses of the last block, the root is used twice."""
    for reach, gathered in ((10**9, ALL), (1, 3 * ROOT + 24 * BLOCK), (2 * ROOT + 1, 3 * ROOT + 23 * BLOCK)):
        step = collectives_of("zero3", f"{ZERO}.stage3_max_reuse_distance={reach}")
        assert sum(collective.size for collective in gathers_of(step.last)) == 4 * gathered, reach
        assert {collective.kind for collective in reductions_of(step.last)} == {"reduce_scatter"}


def test_zero_3_with_secondary_shards_gathers_once_per_step_from_all_ranks() -> None:
    step = collectives_of("zero3", f"{ZERO}.zero_hpz_partition_size=8", accumulation=2)
    assert {collective.group for collective in gathers_of(step.first)} == {Group(RANKS)}
    assert {collective.group for collective in gathers_of(step.last)} == {Group(8)}


def test_muon_exchanges_matrices_after_the_backward_pass() -> None:
    """A rank sends its share to the owners in its group. The owners send the updates to all ranks."""
    matrices = 12 * sum(math.prod(shape) for shape in BLOCK_SHAPES if len(shape) == 2)
    step = collectives_of("fsdp", "backend.fsdp.shard_group_size=4", "optimizer.name=muon", "run.precision=fp32")
    sizes = {group: 0 for group in (Group(4), Group(RANKS))}
    for collective in step.after:
        assert collective.kind == "all_to_all"
        sizes[collective.group] += collective.size
    assert sizes == {Group(4): 4 * matrices // RANKS, Group(RANKS): 4 * matrices // 4}
