"""What one graph of torch.compile covers, counted without a compiler on one of two pretended ranks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch._dynamo.utils import counters
from torch.nn.parallel import DistributedDataParallel
from torch.testing._internal.distributed.fake_pg import FakeStore

from pipeline.backends import ddp, deepspeed_zero
from pipeline.backends.compilation import compiles_blocks
from pipeline.distributed.world import World
from pipeline.model import blocked_loss
from tests.pipeline.backends.conftest import count_graphs, first_of_two, make_backend, micro_batch


@pytest.mark.parametrize(
    ("size", "device", "blocks"), [(1, "cuda", False), (2, "cuda", True), (2, "cpu", False), (1, "cpu", False)]
)
def test_blocks_are_compiled_where_reductions_overlap_the_backward_pass(size: int, device: str, blocks: bool) -> None:
    assert compiles_blocks(World(0, size, 0, torch.device(device))) == blocks


@pytest.fixture(scope="module")
def one_of_two() -> Iterator[World]:
    """One of two pretended ranks; one world for all tests because DeepSpeed keeps process groups in globals."""
    deepspeed = pytest.importorskip("deepspeed")
    with pytest.MonkeyPatch.context() as environment, first_of_two() as world:
        for name, value in (("LOCAL_RANK", "0"), ("DS_ACCELERATOR", "cpu")):
            environment.setenv(name, value)
        yield world
        if deepspeed.comm.is_initialized():
            deepspeed.comm.destroy_process_group()
            dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)  # for first_of_two to destroy


def graphs_of_two_steps(
    world: World, name: str, precision: str, *, recompute: bool, loss_in_blocks: Any
) -> tuple[int, int]:
    """Train two steps of three blocks as one of two GPUs would, but on a CPU. Returns the numbers of graphs and breaks.

    The operations on a block of the vocabulary are not compiled, because their graphs do not belong to the model.
    """
    with pytest.MonkeyPatch.context() as patch:
        for backend_module in (ddp, deepspeed_zero):
            patch.setattr(backend_module, "compiles_blocks", lambda world: True)
        patch.setattr(blocked_loss, "_compiled", lambda step: step)
        graphs = count_graphs(patch)
        counters.clear()
        model = {"n_layer": 3, "activation_checkpointing": recompute}
        run = {"precision": precision, "compile": True, "loss_in_blocks": loss_in_blocks}
        backend = make_backend(name, world, run=run, model=model)
        if isinstance(backend.compute, DistributedDataParallel):
            backend.compute.register_comm_hook(None, keep_gradients)  # the pretended all-reduce returns no result
        for seed in range(2):
            backend.accumulate(*micro_batch(seed), 1 / 32, is_last=False)
            backend.accumulate(*micro_batch(seed + 10), 1 / 32, is_last=True)
            backend.step(1e-3)
        return len(graphs), sum(counters["graph_break"].values())


def keep_gradients(_state, bucket):  # type: ignore[no-untyped-def] # DDP reads annotations, and these are texts
    """Return a finished all-reduce that changes nothing."""
    future: torch.futures.Future[Any] = torch.futures.Future()
    future.set_result(bucket.buffer())
    return future


@pytest.mark.parametrize(
    ("name", "precision", "recompute", "loss_in_blocks"),
    [
        ("ddp", "fp32", False, False),
        ("ddp", "bf16", True, True),
        ("ddp", "amp_bf16", False, "kept"),
        ("fsdp", "bf16", False, "kept"),
        ("zero0", "bf16", False, False),
        ("zero1", "bf16", True, True),
        ("zero2", "amp_bf16", False, False),
        ("zero3", "bf16", False, False),
        ("zero3", "amp_bf16", True, True),
        ("zero3", "bf16", False, "kept"),
    ],
)
def test_graphs_do_not_grow_with_depth(
    one_of_two: World, name: str, precision: str, recompute: bool, loss_in_blocks: Any
) -> None:
    """There is one graph for all blocks and one for the output layer with the loss, and none is broken."""
    counts = graphs_of_two_steps(one_of_two, name, precision, recompute=recompute, loss_in_blocks=loss_in_blocks)
    assert counts == (2, 0)
