"""Every way to compute attention gives the same result, and the log names the kernel that is used."""

from __future__ import annotations

import logging
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from pipeline.model import attention
from pipeline.model.attention import (
    LONGEST_IN_BLOCKS,
    attention_in_blocks,
    causal_attention,
    fastest_kernel,
    kernels_for_any_length,
)

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
    with fastest_kernel(CPU, torch.float32, (1, 1, 8, 64), dropout=0.0) as name:
        assert name == "FLASH_ATTENTION"
        q = torch.zeros(1, 1, 8, 64)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiled:
            F.scaled_dot_product_attention(q, q, q, is_causal=True)
    assert any("flash_attention" in event.key for event in profiled.key_averages())


def test_a_missing_fused_kernel_is_logged(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(attention, "_runs", lambda kernel, q, dropout: False)
    with caplog.at_level(logging.WARNING), fastest_kernel(CPU, torch.float32, (1, 1, 8, 64), 0.0) as name:
        assert name == "MATH"
    assert "no fused kernel for cpu, float32, head size 64 and dropout 0;" in caplog.text


def test_too_little_memory_does_not_count_as_a_missing_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(F, "scaled_dot_product_attention", fail)
    with pytest.raises(torch.OutOfMemoryError), fastest_kernel(CPU, torch.float32, (1, 1, 8, 64), 0.0):
        pass


def test_the_kernel_is_chosen_with_the_dropout_of_the_run(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING), fastest_kernel(CPU, torch.float32, (1, 1, 8, 64), dropout=0.1) as name:
        assert name == "MATH"  # the fused kernel for CPUs has no dropout
    assert "dropout 0.1" in caplog.text


def test_torch_chooses_on_devices_on_which_it_does_not_tell_its_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """On MPS, torch 2.11 to 2.13 has no ``_fused_sdp_choice``."""

    def refuse(*inputs: Tensor, **options: object) -> int:
        raise NotImplementedError("The operator 'aten::_fused_sdp_choice' is not currently implemented for MPS")

    monkeypatch.setattr(torch, "_fused_sdp_choice", refuse)
    with fastest_kernel(CPU, torch.float32, (1, 1, 8, 64), dropout=0.0) as name:
        assert name == "UNKNOWN"
        assert enabled_kernels() == [FLASH, EFFICIENT, MATH]


CUDNN, FLASH, EFFICIENT, MATH = (
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
)


@pytest.mark.parametrize(
    ("capability", "cudnn", "cudnn_first"),
    [
        ((9, 0), 91501, True),
        ((10, 0), 91501, True),
        ((9, 0), 91500, False),
        ((9, 0), None, False),
        ((8, 0), 91501, False),
        ((12, 0), 91501, False),
    ],
)
def test_cudnn_comes_first_where_it_is_right_and_fast(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], cudnn: int | None, cudnn_first: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: cudnn)
    others = [FLASH, EFFICIENT, MATH]
    assert attention._preferred(torch.device("cuda")) == ([CUDNN, *others] if cudnn_first else others)


def test_flash_is_used_where_cudnn_refuses_the_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "_preferred", lambda device: [CUDNN, FLASH, EFFICIENT, MATH])
    monkeypatch.setattr(attention, "_choose", lambda kernels, q, dropout: kernels[0])
    monkeypatch.setattr(attention, "_runs", lambda kernel, q, dropout: kernel != CUDNN)
    with fastest_kernel(CPU, torch.float32, (1, 1, 8, 64), dropout=0.1) as name:
        assert name == "FLASH_ATTENTION"
        assert enabled_kernels() == [FLASH, EFFICIENT, MATH]


def test_cudnn_is_off_for_inputs_of_any_length() -> None:
    before = enabled_kernels()
    with sdpa_kernel([CUDNN, MATH], set_priority=True):
        with kernels_for_any_length():
            assert enabled_kernels() == [FLASH, EFFICIENT, MATH]
        assert enabled_kernels() == [CUDNN, MATH]
    assert enabled_kernels() == before


def heads_on(device: torch.device, dtype: torch.dtype, tokens: int) -> list[Tensor]:
    """Return queries, keys and values with the head size of GPT-2."""
    generator = torch.Generator().manual_seed(0)
    shape = (2, 3, tokens, 64)
    return [torch.randn(shape, generator=generator).to(device, dtype).requires_grad_() for _ in range(3)]


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.bfloat16, 2e-2), (torch.float16, 5e-3), (torch.float32, 1e-4)], ids=str
)
def test_the_fastest_kernel_of_a_gpu_is_fused_and_right(
    gpu: torch.device, dtype: torch.dtype, tolerance: float
) -> None:
    """The named kernel is the one that runs, forward and backward."""
    q, k, v = heads_on(gpu, dtype, 256)
    with fastest_kernel(gpu, dtype, (2, 3, 256, 64), dropout=0.0) as name:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiled:
            found = causal_attention(q, k, v)
        gradients = torch.autograd.grad(found.double().sum(), (q, k, v))
    assert name in {"CUDNN_ATTENTION", "FLASH_ATTENTION", "EFFICIENT_ATTENTION"}
    assert any(name.lower() in event.key for event in profiled.key_averages())
    exact = [tensor.detach().cpu().double().requires_grad_() for tensor in (q, k, v)]
    expected = plain(*exact)
    torch.testing.assert_close(found.detach().cpu().double(), expected.detach(), rtol=tolerance, atol=tolerance)
    for one, other in zip(gradients, torch.autograd.grad(expected.sum(), exact), strict=True):
        torch.testing.assert_close(one.cpu().double(), other, rtol=10 * tolerance, atol=10 * tolerance)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_dropout_of_a_gpu_kernel_follows_the_seed(gpu: torch.device, dtype: torch.dtype) -> None:
    q, k, v = heads_on(gpu, dtype, 256)
    outputs = []
    with fastest_kernel(gpu, dtype, (2, 3, 256, 64), dropout=0.1) as name:
        assert name != "MATH"
        for seed in (5, 5, 6):
            torch.manual_seed(seed)
            outputs.append(causal_attention(q, k, v, 0.1))
        without = causal_attention(q, k, v)
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])
    assert not torch.equal(outputs[0], without)


@pytest.mark.gpu
def test_lengths_without_a_plan_on_a_gpu(gpu: torch.device) -> None:
    """Generation and scoring have lengths that no kernel prefers."""
    for tokens in (1, 7, 77):
        q, k, v = (tensor.detach() for tensor in heads_on(gpu, torch.float32, tokens))
        with kernels_for_any_length():
            found = causal_attention(q, k, v)
        torch.testing.assert_close(found.cpu().double(), plain(q.cpu(), k.cpu(), v.cpu()), rtol=1e-4, atol=1e-4)


def enabled_kernels() -> list[SDPBackend]:
    """Return the kernels that torch may choose on CUDA, in the order of their priority."""
    flags = {
        CUDNN: torch.backends.cuda.cudnn_sdp_enabled(),
        FLASH: torch.backends.cuda.flash_sdp_enabled(),
        EFFICIENT: torch.backends.cuda.mem_efficient_sdp_enabled(),
        MATH: torch.backends.cuda.math_sdp_enabled(),
    }
    order = [SDPBackend(value) for value in torch._C._get_sdp_priority_order()]
    return [kernel for kernel in order if flags.get(kernel)]
