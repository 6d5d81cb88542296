"""Every way to compute attention gives the same result, and the log names the kernel that is used."""

from __future__ import annotations

import logging
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend

from pipeline.model import attention
from pipeline.model.attention import LONGEST_IN_BLOCKS, attention_in_blocks, causal_attention, fastest_kernel

CPU = torch.device("cpu")


def heads(tokens: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, tokens, 5, generator=generator).to(dtype).requires_grad_() for _ in range(3))
    return q, k, v


def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return attention by its definition, in fp64."""
    q, k, v = (tensor.double() for tensor in (q, k, v))
    later = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).triu(1)
    scores = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).masked_fill(later, -math.inf)
    return scores.softmax(-1) @ v


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)])
def test_attention_in_blocks_is_attention(dtype: torch.dtype, tolerance: float) -> None:
    q, k, v = heads(12, dtype)
    found, expected = attention_in_blocks(q, k, v), plain(q, k, v)
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1)).double()
    of_found = torch.autograd.grad((found.double() * weights).sum(), (q, k, v))
    of_expected = torch.autograd.grad((expected * weights).sum(), (q, k, v))
    for one, other in zip(of_found, of_expected, strict=True):
        torch.testing.assert_close(one, other, rtol=10 * tolerance, atol=10 * tolerance)


@pytest.mark.parametrize(
    ("compiling", "tokens", "dropout", "blocks"),
    [
        (True, 12, 0.0, True),
        (False, 12, 0.0, False),
        (True, 13, 0.0, False),
        (True, LONGEST_IN_BLOCKS + 4, 0.0, False),
        (True, 12, 0.1, False),
    ],
)
def test_when_attention_is_computed_in_blocks(
    monkeypatch: pytest.MonkeyPatch, compiling: bool, tokens: int, dropout: float, blocks: bool
) -> None:
    used: list[Tensor] = []
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)
    monkeypatch.setattr(attention, "attention_in_blocks", lambda q, k, v: used.append(q) or v)
    causal_attention(*heads(tokens), dropout)
    assert bool(used) == blocks


def test_the_named_kernel_is_the_one_that_runs() -> None:
    with fastest_kernel(CPU, torch.float32, head_dim=64) as name:
        assert name == "FLASH_ATTENTION"
        q = torch.zeros(1, 1, 8, 64)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiled:
            F.scaled_dot_product_attention(q, q, q, is_causal=True)
    assert any("flash_attention" in event.key for event in profiled.key_averages())


def test_a_missing_fused_kernel_is_logged(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(attention, "_runs", lambda kernel, q: False)
    with caplog.at_level(logging.WARNING), fastest_kernel(CPU, torch.float32, head_dim=64) as name:
        assert name == "MATH"
    assert "no fused kernel" in caplog.text


@pytest.mark.parametrize(
    ("capability", "first"), [((9, 0), "CUDNN_ATTENTION"), ((10, 0), "CUDNN_ATTENTION"), ((8, 0), "FLASH_ATTENTION")]
)
def test_cudnn_comes_first_from_hopper_on(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], first: str
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert attention._preferred(torch.device("cuda"))[0] == getattr(SDPBackend, first)
