"""Backends around a tiny model, in a world of one rank or as one of two pretended ranks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch._dynamo.backends.debugging import aot_eager
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pipeline.backends import Backend, create_backend
from pipeline.config.schema import Config
from pipeline.data.batch_plan import plan_batch
from pipeline.distributed.world import World, join_world
from pipeline.model.gpt2 import GPT2, allocate_model
from tests.pipeline.conftest import random_tokens, tiny_config

# DeepSpeed chooses its accelerator once, when it is imported. The tests in this process train on the CPU.
with pytest.MonkeyPatch.context() as at_import, suppress(ImportError):
    at_import.setenv("DS_ACCELERATOR", "cpu")
    import deepspeed  # noqa: F401


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    """Yield a world of one rank; one per test file because DeepSpeed keeps process groups in globals."""
    deepspeed = pytest.importorskip("deepspeed")
    with pytest.MonkeyPatch.context() as environment:
        for name, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"), ("DS_ACCELERATOR", "cpu")):
            environment.setenv(name, value)
        with join_world(tiny_config().run) as joined:
            yield joined
            if deepspeed.comm.is_initialized():
                deepspeed.comm.destroy_process_group()


@contextmanager
def first_of_two() -> Iterator[World]:
    """Yield the first of two ranks without the other: collectives return at once and leave the tensors as they are.

    A process must not become the second rank, too: DTensor keeps the device mesh of the first in its cache.
    """
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        yield World(0, 2, 0, torch.device("cpu"))
    finally:
        dist.destroy_process_group()


def backend_section(name: str, **options: Any) -> dict[str, Any]:
    """Return the config section of ddp, fsdp or zero0 to zero3, with options of the library."""
    if not name.startswith("zero"):
        return {"name": name, name: options}
    return {"name": "deepspeed", "deepspeed": {"zero_optimization": {"stage": int(name[-1])}, **options}}


def backend_config(name: str, **sections: dict[str, Any]) -> Config:
    return tiny_config(backend=backend_section(name), **sections)


def make_backend(name: str, world: World, **sections: dict[str, Any]) -> Backend:
    config = backend_config(name, **sections)
    backend = create_backend(allocate_model(config.model, "meta"), config, world, plan_batch(config, world.size))
    backend.draw_weights(1)
    return backend


def tensors_of(backend: Backend, *kinds: str) -> dict[str, torch.Tensor]:
    """Return copies of the tensors of some kinds, or of all kinds."""
    return {
        f"{fragment.name} {kind}": tensor.clone()
        for fragment in backend.fragments()
        for kind, tensor in fragment.tensors.items()
        if not kinds or kind in kinds
    }


class MostElements(TorchDispatchMode):
    """Records the largest number of elements of a single tensor, and of all weights of a model together.

    Tensors on the device ``meta`` have no elements, and expanded tensors have those of their storage.
    """

    def __init__(self, model: GPT2) -> None:
        super().__init__()
        self.model = model
        self.of_a_tensor = self.of_the_weights = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        self.of_a_tensor = max([self.of_a_tensor, *map(stored_elements, tensors)])
        self.of_the_weights = max(self.of_the_weights, sum(map(stored_elements, self.model.parameters())))
        return result


def stored_elements(tensor: torch.Tensor) -> int:
    """Return the number of elements in the memory of a tensor on this rank."""
    local = tensor._local_tensor if isinstance(tensor, DTensor) else tensor
    return 0 if local.is_meta else local.untyped_storage().nbytes() // local.itemsize


def micro_batch(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Return tokens and targets, (2, 8) each."""
    tokens = random_tokens(2, 9, seed=seed)
    return tokens[:, :-1], tokens[:, 1:]


def is_compiled(module: torch.nn.Module) -> bool:
    """Return whether a module is compiled by itself, with or without the hooks around it."""
    return module._compiled_call_impl is not None or hasattr(module.forward, "_torchdynamo_orig_callable")


def count_graphs(monkeypatch: pytest.MonkeyPatch) -> list[torch.fx.GraphModule]:
    """Let torch.compile run its graphs eagerly. Returns the list to which every new graph is added."""
    graphs: list[torch.fx.GraphModule] = []

    def run_eagerly(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        graphs.append(graph)
        return aot_eager(graph, inputs)

    compile_function = torch.compile

    def count(function: Any, **_options: Any) -> Any:
        return compile_function(function, backend=run_eagerly, dynamic=False)

    monkeypatch.setattr(torch, "compile", count)  # Module.compile calls it, too
    torch._dynamo.reset()
    return graphs


#: A model whose head size suits the fused attention kernels of GPUs.
GPU_MODEL = {"n_head": 1, "n_embd": 64}


def losses_and_norms(backend: Backend, steps: int = 3) -> list[float]:
    """Train a few steps of two micro-batches, and return the losses and gradient norms in order."""
    device = next(backend.model.parameters()).device
    values: list[float] = []
    for seed in range(steps):
        for half in range(2):
            tokens, targets = (tensor.to(device) for tensor in micro_batch(2 * seed + half))
            values.append(float(backend.accumulate(tokens, targets, 1 / 32, is_last=half == 1)))
        values.append(float(backend.step(1e-3)))
    return values
