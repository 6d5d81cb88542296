"""A batch in tokens determines the accumulation at any world size, or the error lists batches that fit."""

from __future__ import annotations

import re

import pytest

from pipeline.config.schema import Config
from pipeline.data.batch_plan import plan_batch
from pipeline.errors import ConfigError


def config(tokens_per_step: int, micro_batch_size: int, seq_len: int | None = None) -> Config:
    return Config.model_validate(
        {
            "batch": {"tokens_per_step": tokens_per_step, "micro_batch_size": micro_batch_size},
            "data": {"seq_len": seq_len},
        }
    )


@pytest.mark.parametrize(("world_size", "accumulation"), [(1, 32), (2, 16), (8, 4), (32, 1)])
def test_the_recipe_is_the_same_batch_at_every_world_size(world_size: int, accumulation: int) -> None:
    plan = plan_batch(Config(), world_size)
    assert plan.accumulation == accumulation
    assert plan.tokens_per_step == 524_288
    assert plan.samples_per_step == 512


@pytest.mark.parametrize("micro_batch_size", [1, 2, 4, 8])
def test_the_micro_batch_changes_the_accumulation_only(micro_batch_size: int) -> None:
    plan = plan_batch(config(8 * 64, micro_batch_size, seq_len=64), 1)
    assert plan.accumulation * micro_batch_size == 8
    assert plan.tokens_per_step == 512


def test_it_reads_as_the_arithmetic() -> None:
    plan = plan_batch(config(4096, 4, seq_len=128), 2)
    assert str(plan) == "4,096 tokens per step = 4 sequences x 128 tokens x 4 micro-steps x 2 ranks"
    plan = plan_batch(config(1024, 1, seq_len=1024), 1)
    assert str(plan) == "1,024 tokens per step = 1 sequence x 1,024 tokens x 1 micro-step x 1 rank"


def numbers_after(words: str, message: str) -> list[int]:
    """The list of numbers that follows some words."""
    match = re.search(rf"{re.escape(words)} ((\d+(, )?)+)", message)
    return [int(number) for number in match[1].split(", ")] if match else []


@pytest.mark.parametrize(
    ("tokens", "micro_batch_size", "world_size", "tokens_that_fit", "micro_batches_that_fit"),
    [
        (1000, 2, 1, [896, 1024], []),  # no whole number of sequences
        (100, 2, 1, [128], []),  # less than one micro-step
        (64 * 6, 4, 1, [256, 512], [1, 2, 3, 6]),
        (64 * 6, 4, 2, [512], [1, 3]),
        (64 * 6, 2, 4, [512], []),  # six sequences for four ranks
    ],
)
def test_what_does_not_divide_lists_what_would(
    tokens: int, micro_batch_size: int, world_size: int, tokens_that_fit: list[int], micro_batches_that_fit: list[int]
) -> None:
    with pytest.raises(ConfigError) as caught:
        plan_batch(config(tokens, micro_batch_size, seq_len=64), world_size)
    message = str(caught.value)
    assert message.startswith(f"batch.tokens_per_step ({tokens}) is not a multiple of")
    assert numbers_after("tokens_per_step that would fit:", message) == tokens_that_fit
    assert numbers_after("or batch.micro_batch_size:", message) == micro_batches_that_fit
    for fitting in tokens_that_fit:
        assert plan_batch(config(fitting, micro_batch_size, seq_len=64), world_size).tokens_per_step == fitting
    for fitting in micro_batches_that_fit:
        assert plan_batch(config(tokens, fitting, seq_len=64), world_size).tokens_per_step == tokens


@pytest.mark.parametrize(("size", "world_size", "fitting"), [(2, 3, "1, 3"), (8, 4, "1, 2, 4"), (3, 8, "1, 2, 4, 8")])
def test_shard_groups_must_divide_the_ranks(size: int, world_size: int, fitting: str) -> None:
    section = {"name": "fsdp", "fsdp": {"shard_group_size": size}}
    with pytest.raises(ConfigError) as caught:
        plan_batch(Config.model_validate({"backend": section}), world_size)
    assert str(caught.value) == (
        f"backend.fsdp.shard_group_size ({size}) does not divide the number of ranks ({world_size}); sizes that would "
        f"fit: {fitting}, or null for all ranks"
    )
    plan_batch(Config.model_validate({"backend": {**section, "name": "ddp"}}), 8)
