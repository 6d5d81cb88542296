"""FSDP2's collectives on CPUs equal gloo's gather and the sum in the order of the ranks, bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.runs import run_ranks

PROGRAM = """
import torch
import torch.distributed as dist

from pipeline.backends.gloo_collectives import AllGather, ReduceScatter

dist.init_process_group("gloo")
group, rank, size = dist.group.WORLD, dist.get_rank(), dist.get_world_size()
random = torch.Generator().manual_seed(rank)
for length in (1, 7, 4096):
    for dtype in (torch.float32, torch.bfloat16):
        shard = torch.randn(length, generator=random).to(dtype)
        expected = torch.empty(size * length, dtype=dtype)
        dist.all_gather_into_tensor(expected, shard)
        gathered = AllGather().allocate((size * length,), dtype=dtype, device=shard.device)
        AllGather()(gathered, shard, group)
        assert torch.equal(gathered, expected)
        in_place = torch.zeros_like(expected)
        own = in_place.narrow(0, rank * length, length).copy_(shard)
        AllGather()(in_place, own, group)
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


@pytest.mark.parametrize("ranks", [2, 3])
def test_gathered_and_reduced(ranks: int, tmp_path: Path) -> None:
    program = tmp_path / "collectives.py"
    program.write_text(PROGRAM, encoding="utf-8")
    result = run_ranks(ranks, program, [])
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("agrees") == ranks
