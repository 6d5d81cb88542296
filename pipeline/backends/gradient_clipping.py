"""Unscale the gradients, clip them by their global norm, and update the weights if this norm is finite."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.backends.dtensors import is_dtensor, local_shard
from pipeline.hardware.device import summing_dtype

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

CLIP_EPS = 1e-6  # added to the divisor, as in torch and DeepSpeed
_CACHED_ELEMENTS = 1 << 16  # 512 KiB in fp64


def clip_and_step(
    optimizer: torch.optim.Optimizer, parameters: Iterable[Tensor], loss_scale: float, max_norm: float
) -> Tensor:
    """Unscale and clip the gradients. If their norm is finite, update the weights. Return the norm before clipping."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norm = unscale_and_clip(gradients, loss_scale, max_norm)
    step_if_finite(optimizer, norm)
    return norm


def unscale_and_clip(gradients: list[Tensor], loss_scale: float, max_norm: float) -> Tensor:
    """Divide the gradients by the loss scale, and clip them to the global norm ``max_norm``, in place.

    If ``max_norm`` is 0, the gradients are not clipped. Returns the unscaled norm before clipping, as a scalar.
    """
    norm = global_grad_norm(gradients) / loss_scale
    factor = torch.full_like(norm, 1.0 / loss_scale)
    if max_norm > 0:
        factor = factor * torch.clamp(max_norm / (norm + CLIP_EPS), max=1.0)
    local = [local_shard(gradient) for gradient in gradients]
    torch._foreach_mul_(local, factor.to(local[0].dtype))
    return norm


def step_if_finite(optimizer: torch.optim.Optimizer, norm: Tensor) -> None:
    """If the gradient norm is finite, update the weights. Otherwise, weights, moments and step count do not change.

    With the fused AdamW on a GPU, the host does not wait for the norm: AdamW reads a flag on the GPU.
    """
    if norm.is_cuda and optimizer.defaults.get("fused"):
        optimizer.grad_scale, optimizer.found_inf = None, (~torch.isfinite(norm)).float()  # type: ignore[attr-defined]
        optimizer.step()
    elif torch.isfinite(norm).item():
        optimizer.step()


def global_grad_norm(gradients: list[Tensor]) -> Tensor:
    """Return the L2 norm of all gradients together, as a scalar on the gradients' device.

    For DTensors, the norm includes the shards of all ranks. The squares are summed in fp64 if possible, so that all
    backends get the same norm.
    """
    local = [local_shard(gradient) for gradient in gradients]
    squares = torch.stack([_sum_of_squares(gradient) for gradient in local]).sum()
    if is_dtensor(gradients[0]):
        dist.all_reduce(squares, group=_sharding_group(gradients[0]))
    return squares.sqrt()


def _sharding_group(tensor: DTensor) -> dist.ProcessGroup:
    """Return the ranks that together hold one copy of a DTensor."""
    (dimension,) = (i for i, placement in enumerate(tensor.placements) if placement.is_shard())
    return tensor.device_mesh.get_group(dimension)


def _sum_of_squares(gradient: Tensor) -> Tensor:
    """Return the sum of the squares in ``summing_dtype``. On a CPU, convert the gradient piece by piece."""
    dtype = summing_dtype(gradient.device)
    if gradient.device.type != "cpu":
        return torch.linalg.vector_norm(gradient, dtype=dtype).square()
    total = torch.zeros((), dtype=dtype)
    cached = torch.empty(min(_CACHED_ELEMENTS, gradient.numel()), dtype=dtype)
    for piece in torch.split(gradient.reshape(-1), _CACHED_ELEMENTS):
        converted = cached[: len(piece)].copy_(piece)
        total += torch.dot(converted, converted)
    return total
