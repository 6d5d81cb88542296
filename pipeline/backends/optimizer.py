"""AdamW over the right groups, and the one global gradient norm."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from pipeline.config.schema import OptimizerConfig
from pipeline.distributed.device import summing_dtype

log = logging.getLogger(__name__)

FUSED_DEVICES = ("cpu", "cuda", "mps")
_CACHED_ELEMENTS = 1 << 16  # 512 KiB in fp64
CLIP_EPS = 1e-6  # in the divisor, as torch and DeepSpeed have it


def parameter_groups(parameters: Iterable[Tensor], weight_decay: float) -> list[dict[str, Any]]:
    """Two groups: tensors of two dimensions or more decay, biases and LayerNorm weights do not."""
    decayed: list[Tensor] = []
    spared: list[Tensor] = []
    for parameter in parameters:
        (decayed if parameter.dim() >= 2 else spared).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": spared, "weight_decay": 0.0}]


def build_adamw(parameters: Iterable[Tensor], config: OptimizerConfig, device: torch.device) -> torch.optim.AdamW:
    """torch's AdamW, fused where the device has it; a fallback is logged."""
    fused = device.type in FUSED_DEVICES
    if not fused:
        log.warning("fused AdamW is not available on %s; using the plain one", device.type)
    return torch.optim.AdamW(
        parameter_groups(parameters, config.weight_decay),
        lr=config.learning_rate,
        betas=config.betas,
        eps=config.eps,
        fused=fused,
    )


def set_learning_rate(param_groups: Iterable[dict[str, Any]], learning_rate: float) -> None:
    """The schedule's rate for every group."""
    for group in param_groups:
        group["lr"] = learning_rate


def global_grad_norm(gradients: list[Tensor]) -> Tensor:
    """The L2 norm over all gradients of all ranks, a scalar on their device.

    Squares are summed in fp64: the order of summation then does not show, and backends agree. Sharded
    gradients (DTensor) are summed over the ranks.
    """
    sharded = any(isinstance(gradient, DTensor) for gradient in gradients)
    local = [gradient.to_local() if isinstance(gradient, DTensor) else gradient for gradient in gradients]
    squares = torch.stack([_sum_of_squares(gradient) for gradient in local]).sum()
    if sharded:
        dist.all_reduce(squares)
    return squares.sqrt()


def _sum_of_squares(gradient: Tensor) -> Tensor:
    """In fp64. A CPU converts piece by piece, in memory that stays cached; torch would convert the whole first."""
    dtype = summing_dtype(gradient.device)
    if gradient.device.type != "cpu":
        return torch.linalg.vector_norm(gradient, dtype=dtype).square()
    total = torch.zeros((), dtype=dtype)
    cached = torch.empty(min(_CACHED_ELEMENTS, gradient.numel()), dtype=dtype)
    for piece in torch.split(gradient.reshape(-1), _CACHED_ELEMENTS):
        converted = cached[: len(piece)].copy_(piece)
        total += torch.dot(converted, converted)
    return total


def unscale_and_clip(gradients: list[Tensor], loss_scale: float, max_norm: float) -> Tensor:
    """Divide gradients by the loss scale and bring their norm down to ``max_norm`` (0: do not), in place.

    Returns:
        The global norm of the unscaled gradients, before clipping.
    """
    norm = global_grad_norm(gradients) / loss_scale
    factor = torch.full_like(norm, 1.0 / loss_scale)
    if max_norm > 0:
        factor = factor * torch.clamp(max_norm / (norm + CLIP_EPS), max=1.0)
    local = [gradient.to_local() if isinstance(gradient, DTensor) else gradient for gradient in gradients]
    torch._foreach_mul_(local, factor.to(local[0].dtype))
    return norm


def skip_unless_finite(optimizer: torch.optim.Optimizer, norm: Tensor) -> bool:
    """Keep gradients that are not finite from changing anything.

    Fused AdamW looks at a flag on the device, so that a GPU is not waited for; it then leaves weights, moments and
    its step count alone.

    Returns:
        Whether the caller must skip the update.
    """
    if norm.is_cuda and optimizer.defaults.get("fused"):
        optimizer.grad_scale, optimizer.found_inf = None, (~torch.isfinite(norm)).float()  # type: ignore[attr-defined]
        return False
    return not torch.isfinite(norm).item()
