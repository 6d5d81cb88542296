"""FSDP2: every rank holds its rows, the norm counts all rows, and gradients are synchronized once per step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from pipeline.backends.fsdp import FsdpBackend
from pipeline.distributed.world import World
from pipeline.model import initialisation
from pipeline.model.gpt2 import allocate_model
from tests.pipeline.backends.conftest import (
    MostElements,
    backend_config,
    first_of_two,
    is_compiled,
    micro_batch,
)
from tests.support.runs import run_ranks

#: The custom collectives against gloo's gather, and against a sum in the order of the ranks, bit for bit.
COLLECTIVES = """
import torch
import torch.distributed as dist

from pipeline.backends.fsdp_collectives import AllGather, ReduceScatter

dist.init_process_group("gloo")
group, rank, size = dist.group.WORLD, dist.get_rank(), dist.get_world_size()
random = torch.Generator().manual_seed(rank)
for length in (1, 7, 4096):
    for dtype in (torch.float32, torch.bfloat16):
        shard = torch.randn(length, generator=random).to(dtype)
        expected = torch.empty(size * length, dtype=dtype)
        dist.all_gather_into_tensor(expected, shard)
        gathered = AllGather().allocate((size * length,), dtype=dtype, device=shard.device)
        AllGather()(gathered, shard, group).wait()
        assert torch.equal(gathered, expected)
        in_place = torch.zeros_like(expected)
        own = in_place.narrow(0, rank * length, length).copy_(shard)
        AllGather()(in_place, own, group).wait()
        assert torch.equal(in_place, expected)

    whole = torch.randn(size * length, generator=random)
    kept = whole.clone()
    for op in (dist.ReduceOp.SUM, dist.ReduceOp.AVG):
        from_all = torch.empty(size, size * length)
        dist.all_gather_into_tensor(from_all.view(-1), whole)
        expected = from_all.sum(0)[rank * length : (rank + 1) * length]
        expected = expected / size if op == dist.ReduceOp.AVG else expected
        reduced = torch.empty(length)
        ReduceScatter()(reduced, whole, group, op)
        assert torch.equal(reduced, expected), (reduced, expected)
        assert torch.equal(whole, kept), "the input must not change"
dist.barrier()
print(f"rank {rank} agrees", flush=True)
dist.destroy_process_group()
"""

#: Two ranks gather their fragments, and compute the norm of gradients that are known as a whole.
SHARDS = """
import torch
import torch.distributed as dist

from pipeline.backends.fsdp import FsdpBackend
from pipeline.backends.gradient_clipping import global_grad_norm
from pipeline.distributed.world import join_world
from pipeline.model.gpt2 import allocate_model, build_model
from tests.pipeline.backends.conftest import backend_config

config = backend_config("fsdp")
whole = {name: p.detach().flatten() for name, p in build_model(config.model, 1).named_parameters()}
with join_world(config.run) as world:
    backend = FsdpBackend(allocate_model(config.model, "meta"), config, world)
    backend.draw_weights(1)
    fragments = {fragment.name: fragment for fragment in backend.fragments()}
    found = world.gather({name: (fragment.start, fragment.weight) for name, fragment in fragments.items()})
    for name, weight in whole.items():
        assert [start for start, _ in (rank[name] for rank in found)] == [0, len(found[0][name][1])], name
        assert torch.equal(torch.cat([rank[name][1] for rank in found]), weight), name
    assert len(found[0]["wte.weight"][1]) == len(found[1]["wte.weight"][1])

    gradients = []
    for name, parameter in backend.parameters.items():
        gradient, start = torch.zeros_like(parameter), fragments[name].start
        gradient.to_local().view(-1).copy_(whole[name][start : start + gradient.to_local().numel()])
        gradients.append(gradient)
    torch.testing.assert_close(global_grad_norm(gradients), global_grad_norm(list(whole.values())), rtol=1e-12, atol=0)
    dist.barrier()
    print(f"rank {world.rank} agrees", flush=True)
"""


def test_two_ranks_hold_every_element_once_and_the_norm_counts_them_all(tmp_path: Path) -> None:
    program = tmp_path / "shards.py"
    program.write_text(SHARDS, encoding="utf-8")
    result = run_ranks(2, program, [])
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("agrees") == 2


#: Two ranks count the gathers of a step with three micro-steps and two blocks.
GATHERS = """
from pipeline.backends.fsdp import FsdpBackend
from pipeline.backends.fsdp_collectives import AllGather
from pipeline.distributed.world import join_world
from pipeline.model.gpt2 import allocate_model
from tests.pipeline.backends.conftest import backend_section, micro_batch
from tests.pipeline.conftest import tiny_config

events, gather = [], AllGather.__call__


def count(self, *inputs, **options):
    events.append("gather")
    return gather(self, *inputs, **options)


AllGather.__call__ = count
with join_world(tiny_config().run) as world:
    for reshards in (True, False):
        config = tiny_config(backend=backend_section("fsdp", reshard_after_forward=reshards))
        backend = FsdpBackend(allocate_model(config.model, "meta"), config, world)
        backend.draw_weights(1)
        for block in backend.model.h:
            block.register_forward_pre_hook(lambda *_: events.append("block"))
        for _ in range(2):
            events.clear()
            for seed in range(3):
                backend.accumulate(*micro_batch(seed), 1 / 48, is_last=seed == 2)
            backend.step(1e-3)
        print(f"gathers: {reshards} {events.count('gather')}, {events.index('block')} early", flush=True)
"""


def test_weights_that_stay_gathered_are_gathered_once_per_step(tmp_path: Path) -> None:
    """The root is always gathered once. A block that is resharded is gathered twice per micro-step, otherwise once.

    The gathers of both blocks start before the first block computes.
    """
    program = tmp_path / "gathers.py"
    program.write_text(GATHERS, encoding="utf-8")
    result = run_ranks(2, program, [])
    assert result.returncode == 0, result.stderr
    assert result.stdout.count(f"gathers: True {1 + 3 * 2 * 2}, 3 early") == 2
    assert result.stdout.count(f"gathers: False {1 + 2}, 3 early") == 2


def make_fsdp(world: World, **sections: Any) -> FsdpBackend:
    config = backend_config("fsdp", **sections)
    backend = FsdpBackend(allocate_model(config.model, "meta"), config, world)
    backend.draw_weights(1)
    return backend


def test_no_rank_has_a_whole_weight_at_any_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(initialisation, "BLOCK_ELEMENTS", 64)
    config = backend_config("fsdp")
    model = allocate_model(config.model, "meta")
    halves = [-(-p.shape[0] // 2) * p.shape[1:].numel() for p in model.parameters()]
    with first_of_two() as world, MostElements(model) as most:
        backend = FsdpBackend(model, config, world)
        backend.draw_weights(1)
    assert most.of_a_tensor == max(halves)
    assert most.of_the_weights <= sum(halves)
    backend.model.assert_tied()


def test_gradients_are_synchronised_at_the_end_of_a_step(world: World) -> None:
    backend = make_fsdp(world)
    for seed in range(3):
        assert all(parameter.grad is None for parameter in backend.parameters.values())
        backend.accumulate(*micro_batch(seed), 1 / 48, is_last=seed == 2)
    assert all(isinstance(parameter.grad, DTensor) for parameter in backend.parameters.values())
    assert backend.step(1e-3) > 0
    assert all(parameter.grad is None for parameter in backend.parameters.values())


@pytest.mark.parametrize(("precision", "computed"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_masters_gradients_and_moments_are_fp32(world: World, precision: str, computed: torch.dtype) -> None:
    backend = make_fsdp(world, run={"precision": precision})
    assert backend(micro_batch()[0], method="logits").dtype == computed
    assert backend(*micro_batch(), method="loss").dtype == torch.float32
    backend.accumulate(*micro_batch(), 1 / 16, is_last=True)
    assert {p.grad.dtype for p in backend.parameters.values() if p.grad is not None} == {torch.float32}
    dtypes = backend.dtypes()
    assert dtypes.pop("compute weights") == computed
    assert set(dtypes.values()) == {torch.float32}


def test_each_block_is_sharded_by_itself_and_the_tied_weight_by_the_root(world: World) -> None:
    backend = make_fsdp(world)
    sharded = [name for name, module in backend.compute.named_modules() if isinstance(module, FSDPModule)]
    assert sharded == ["", "model.h.0", "model.h.1"]
    backend.model.assert_tied()


def test_blocks_and_output_layer_are_compiled_one_by_one(world: World) -> None:
    backend = make_fsdp(world, run={"compile": True})
    compiled = [name for name, module in backend.compute.named_modules() if is_compiled(module)]
    assert compiled == ["model.h.0", "model.h.1", "model.lm_head"]


@pytest.mark.parametrize("ranks", [2, 3])
def test_collectives_on_cpus_equal_those_of_gloo(ranks: int, tmp_path: Path) -> None:
    program = tmp_path / "collectives.py"
    program.write_text(COLLECTIVES, encoding="utf-8")
    result = run_ranks(ranks, program, [])
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("agrees") == ranks
