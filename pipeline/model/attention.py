"""Compute causal self-attention with torch's fastest kernel. All kernels compute the same function."""

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

log = logging.getLogger(__name__)

#: The number of query blocks in attention on a CPU. A block skips the keys after its last query.
QUERY_BLOCKS = 4
#: The longest window for which blocks are known to be faster. Their memory grows with the square of the window length.
LONGEST_IN_BLOCKS = 1024

_KERNELS = (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH)
_LAST_FAULTY_CUDNN = 91500  # 9.15.0

#: (layer, queries, keys, values) -> attention output. All tensors have shape (B, H, T, D).
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]


def causal_attention(q: Tensor, k: Tensor, v: Tensor, dropout: float = 0.0) -> Tensor:
    """Return softmax(q k^T / sqrt(D)) v, shape (B, H, T, D). No token attends to a later token.

    Args:
        q, k, v: each of shape (B, H, T, D).
        dropout: the dropout probability for the attention weights.
    """
    T = q.shape[2]
    in_blocks = torch.compiler.is_compiling() and q.device.type == "cpu" and not dropout
    if in_blocks and T % QUERY_BLOCKS == 0 and T <= LONGEST_IN_BLOCKS:
        return attention_in_blocks(q, k, v)
    return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)


def attention_in_blocks(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Compute ``causal_attention`` with matrix products, one block of queries at a time.

    torch.compile can fuse matrix products with other operations. It cannot fuse torch's attention kernels.
    """
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
def fastest_kernel(
    device: torch.device, dtype: torch.dtype, shape: tuple[int, int, int, int], dropout: float
) -> Iterator[str]:
    """Return a context manager in which attention uses the fastest kernel that supports the arguments.

    The ``with`` block gets torch's name for the kernel. The name is ``MATH`` if no fused kernel works, and ``UNKNOWN``
    if torch does not report its choice.

    Args:
        shape: the shape (B, H, T, D) of the queries in training.
    """
    # On a CPU, the choice does not depend on the number of sequences and heads, and a trial with all of them is slow.
    sequences_and_heads = (1, 1) if device.type == "cpu" else shape[:2]
    q = torch.zeros((*sequences_and_heads, *shape[2:]), device=device, dtype=dtype, requires_grad=True)
    kernels = _preferred(device)
    chosen = _choose(kernels, q, dropout)
    while chosen is not None and chosen != SDPBackend.MATH and not _runs(chosen, q, dropout):
        kernels.remove(chosen)
        chosen = _choose(kernels, q, dropout)
    if chosen == SDPBackend.MATH:
        log.warning(
            "attention has no fused kernel for %s, %s, head size %d and dropout %g; using plain matrix products",
            *(device.type, str(dtype).removeprefix("torch."), shape[3], dropout),
        )
    del q  # its memory is as large as a layer's activations
    with sdpa_kernel(kernels, set_priority=True):
        yield "UNKNOWN" if chosen is None else chosen.name


@contextmanager
def kernels_for_any_length() -> Iterator[None]:
    """Return a context manager in which attention does not use cuDNN's kernel.

    That kernel needs up to 0.4 s of preparation for each new shape.
    """
    with sdpa_kernel(list(_KERNELS), set_priority=True):
        yield


def _preferred(device: torch.device) -> list[SDPBackend]:
    """Return the kernels that torch may choose, the fastest first.

    cuDNN's kernel is the fastest on Hopper and Blackwell data center GPUs. cuDNN up to 9.15.0 computes wrong results
    for some lengths (https://github.com/pytorch/pytorch/issues/169849).
    """
    if device.type != "cuda" or torch.cuda.get_device_capability(device)[0] not in (9, 10):
        return list(_KERNELS)
    version = torch.backends.cudnn.version() or 0  # type: ignore[no-untyped-call]
    return [SDPBackend.CUDNN_ATTENTION, *_KERNELS] if version > _LAST_FAULTY_CUDNN else list(_KERNELS)


def _choose(kernels: list[SDPBackend], q: Tensor, dropout: float) -> SDPBackend | None:
    """Return the kernel that torch chooses, or None if torch does not report it. On MPS, torch does not report it."""
    with sdpa_kernel(kernels, set_priority=True), suppress(NotImplementedError):
        return SDPBackend(torch._fused_sdp_choice(q, q, q, dropout_p=dropout, is_causal=True))
    return None


def _runs(kernel: SDPBackend, q: Tensor, dropout: float) -> bool:
    """Return whether a kernel supports the arguments. Too little memory or a broken GPU are errors."""
    try:
        with sdpa_kernel([kernel]):
            y = F.scaled_dot_product_attention(q, q, q, dropout_p=dropout, is_causal=True)
            y.sum().backward()  # type: ignore[no-untyped-call]
    except (torch.OutOfMemoryError, torch.AcceleratorError):
        raise
    except RuntimeError:
        return False
    return True
