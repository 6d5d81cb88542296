"""Causal self-attention with the fastest of torch's kernels. All kernels compute the same result."""

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

log = logging.getLogger(__name__)

#: Number of query blocks in attention that is compiled for a CPU. A block skips the keys after its last query.
QUERY_BLOCKS = 4
#: The longest window for which blocks were measured to be faster; their memory grows with its square.
LONGEST_IN_BLOCKS = 1024

#: (layer, queries, keys, values) -> attention output; all tensors (B, H, T, D).
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]


def causal_attention(q: Tensor, k: Tensor, v: Tensor, dropout: float = 0.0) -> Tensor:
    """Return softmax(q k^T / sqrt(D)) v, where no token sees a later one.

    Args:
        q, k, v: (B, H, T, D), as the result.
        dropout: probability, on the attention weights.
    """
    T = q.shape[2]
    in_blocks = torch.compiler.is_compiling() and q.device.type == "cpu" and not dropout
    if in_blocks and T % QUERY_BLOCKS == 0 and T <= LONGEST_IN_BLOCKS:
        return attention_in_blocks(q, k, v)
    return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)


def attention_in_blocks(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return causal attention as matrix products, one block of queries at a time, for the compiler to fuse."""
    T, D = q.shape[2:]
    width = T // QUERY_BLOCKS
    blocks = []
    for start in range(0, T, width):
        stop = start + width
        queries, keys = torch.arange(start, stop, device=q.device), torch.arange(stop, device=q.device)
        scores = (q[:, :, start:stop] @ k[:, :, :stop].transpose(-1, -2)).float() / math.sqrt(D)  # (B, H, width, stop)
        scores = scores.masked_fill(keys > queries[:, None], -math.inf)
        blocks.append(scores.softmax(dim=-1).to(v.dtype) @ v[:, :, :stop])
    return torch.cat(blocks, dim=2)


@contextmanager
def fastest_kernel(device: torch.device, dtype: torch.dtype, head_dim: int) -> Iterator[str]:
    """Run attention with the fastest kernel that the device has for this dtype and head size; yield its name.

    The name is the one that torch reports. ``MATH`` means that there is no fused kernel, and is logged as a warning.
    """
    q = torch.zeros(1, 1, 128, head_dim, device=device, dtype=dtype, requires_grad=True)
    fused = next((kernel for kernel in _preferred(device) if _runs(kernel, q)), None)
    kernels = [fused] if fused else []
    with sdpa_kernel([*kernels, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH], set_priority=True):
        chosen = SDPBackend(torch._fused_sdp_choice(q, q, q, is_causal=True))
        assert fused in (None, chosen), f"torch chose {chosen} where {fused} runs"
        if chosen == SDPBackend.MATH:
            log.warning("attention has no fused kernel for this device and dtype; using plain matrix products")
        yield chosen.name


def _preferred(device: torch.device) -> list[SDPBackend]:
    kernels = [SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION]
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0):
        kernels.reverse()  # from Hopper on, cuDNN's kernel is faster than flash attention 2
    return kernels


def _runs(kernel: SDPBackend, q: Tensor) -> bool:
    """Return whether the kernel's forward and backward pass work; one that torch was built without raises."""
    try:
        with sdpa_kernel([kernel]):
            F.scaled_dot_product_attention(q, q, q, is_causal=True).sum().backward()  # type: ignore[no-untyped-call]
    except RuntimeError:
        return False
    return True
