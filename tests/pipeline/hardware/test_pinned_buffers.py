"""Pinned buffers share allocations that are powers of two, and little memory is lost."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.config.schema import ModelConfig
from pipeline.hardware.pinned_buffers import allocate_host_buffers, pinned_size, plan_slabs
from pipeline.model.gpt2 import GPT2


def sizes_of_state(preset: str) -> list[int]:
    """Return the bytes of the weights and both moments of a model, one per tensor."""
    with torch.device("meta"):
        model = GPT2(ModelConfig.model_validate({"preset": preset}))
    return [parameter.nbytes for parameter in model.parameters()] * 3


@pytest.mark.parametrize("preset", ["gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"])
def test_gpt2_loses_little_memory(preset: str) -> None:
    sizes = sizes_of_state(preset)
    slabs = plan_slabs(sizes)
    assert all(slab.size == pinned_size(slab.size) for slab in slabs)
    assert sum(slab.size for slab in slabs) < 1.05 * sum(sizes)
    assert sum(map(pinned_size, sizes)) > 1.1 * sum(sizes), "one allocation per tensor loses more"


def test_slabs_never_need_more_than_one_allocation_per_tensor() -> None:
    draw = random.Random(1)
    for _ in range(2000):
        sizes = [draw.randint(512, draw.choice([5_000, 1_000_000])) for _ in range(draw.randint(1, 12))]
        total = sum(slab.size for slab in plan_slabs(sizes))
        assert total <= sum(map(pinned_size, sizes)), sizes
        assert total < 2 * sum(size + 512 for size in sizes), sizes


@pytest.mark.parametrize("sizes", [[], [1], [512], [513, 1, 7], [3000, 3000, 3000], [1 << 20, 5, (1 << 20) + 1]])
def test_every_tensor_has_bytes_of_its_own(sizes: Sequence[int]) -> None:
    places = {index: (slab, offset) for slab in plan_slabs(sizes) for index, offset in slab.offsets.items()}
    assert sorted(places) == list(range(len(sizes)))
    for slab in plan_slabs(sizes):
        end = 0
        for index, offset in sorted(slab.offsets.items(), key=lambda item: item[1]):
            assert offset >= end and offset % 512 == 0
            end = offset + sizes[index]
        assert end <= slab.size


@pytest.mark.parametrize("on_gpu", [False, True])
def test_buffers_have_the_shapes_and_dtypes_of_their_sources(monkeypatch: pytest.MonkeyPatch, on_gpu: bool) -> None:
    """``is_cuda`` stands for sources on a GPU."""
    pinned: list[int] = []

    def empty(size: int, *, dtype: torch.dtype, pin_memory: bool) -> Tensor:
        assert pin_memory
        pinned.append(size)
        return torch.zeros(size, dtype=dtype)

    sources = {
        "a": torch.randn(7, 5),
        "b": torch.randn(1000, dtype=torch.float64),
        "c": torch.arange(9, dtype=torch.int16),
        "d": torch.randn(()),
    }
    with monkeypatch.context() as patches:
        patches.setattr(torch, "empty", empty)
        patches.setattr(Tensor, "is_cuda", on_gpu)
        buffers = allocate_host_buffers(sources)
    assert pinned == ([8192, 1024, 512] if on_gpu else [])
    for name, source in sources.items():
        buffers[name].copy_(source)
    for name, source in sources.items():
        assert buffers[name].dtype == source.dtype
        assert torch.equal(buffers[name], source), name


def test_buffers_are_in_host_memory_on_every_device() -> None:
    sources: dict[str, Any] = {"a": torch.empty(3, 2, device="meta")}  # such as mps
    assert allocate_host_buffers(sources)["a"].device.type == "cpu"
