"""Build the optimizer, clip the gradients, and scale the loss for fp16."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.backends.dtensors import is_dtensor, local_shard
from pipeline.backends.eager_optimizers import AdamW
from pipeline.backends.muon import Muon, divide_parameters
from pipeline.config.schema import Config, OptimizerConfig
from pipeline.distributed.device import summing_dtype
from pipeline.distributed.world import World

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

log = logging.getLogger(__name__)

FUSED_DEVICES = ("cpu", "cuda", "mps")
_CACHED_ELEMENTS = 1 << 16  # 512 KiB in fp64
CLIP_EPS = 1e-6  # added to the divisor, as in torch and DeepSpeed
GROWTH_INTERVAL = 2000  # steps without overflow before the loss scale doubles (Micikevicius et al. 2018)


def parameter_groups(parameters: Iterable[Tensor], weight_decay: float) -> list[dict[str, Any]]:
    """Return two parameter groups. Matrices have weight decay. Biases and LayerNorm weights have none."""
    every = list(parameters)
    return [
        {"params": [parameter for parameter in every if parameter.dim() >= 2], "weight_decay": weight_decay},
        {"params": [parameter for parameter in every if parameter.dim() < 2], "weight_decay": 0.0},
    ]


def build_adamw(parameters: Iterable[Tensor], config: OptimizerConfig, device: torch.device) -> AdamW:
    """Return torch's fused AdamW. If the device does not support it, warn and return the plain AdamW."""
    fused = device.type in FUSED_DEVICES
    if not fused:
        log.warning("fused AdamW is not available on %s; using the plain one", device.type)
    return AdamW(
        parameter_groups(parameters, config.weight_decay),
        lr=config.learning_rate,
        betas=config.betas,
        eps=config.eps,
        fused=fused,
    )


def build_optimizer(
    parameters: Mapping[str, Tensor],
    config: Config,
    world: World,
    build_rest: Callable[[Iterable[Tensor]], torch.optim.Optimizer] | None = None,
) -> torch.optim.Optimizer:
    """Return the optimizer that the config selects: AdamW, or a ``Muon`` that contains an AdamW.

    Args:
        parameters: maps canonical names to all parameters of the model.
        build_rest: takes parameters and returns their AdamW, for example DeepSpeed's CPUAdam. It receives all
            parameters that Muon does not update. If None, ``build_adamw`` is used.
    """
    build = build_rest or partial(build_adamw, config=config.optimizer, device=world.device)
    if config.optimizer.name == "adamw":
        return build(parameters.values())
    matrices, rest = divide_parameters(parameters)
    return Muon(
        matrices,
        build(rest.values()),
        config.optimizer.muon,
        world,
        weight_decay=config.optimizer.weight_decay,
        dtype=torch.float32 if config.run.precision == "fp32" else torch.bfloat16,
    )


def describe_optimizer(optimizer: torch.optim.Optimizer) -> str:
    """Return the name of an optimizer, such as ``Muon and fused AdamW``."""
    if isinstance(optimizer, Muon):
        return f"Muon and {describe_optimizer(optimizer.adamw)}"
    return f"{'fused ' if optimizer.defaults.get('fused') else ''}{type(optimizer).__name__}"


def set_learning_rate(param_groups: Iterable[dict[str, Any]], learning_rate: float) -> None:
    for group in param_groups:
        group["lr"] = learning_rate


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


def clip_and_step(
    optimizer: torch.optim.Optimizer, parameters: Iterable[Tensor], loss_scale: float, max_norm: float
) -> Tensor:
    """Unscale and clip the gradients. If their norm is finite, update the weights. Return the norm before clipping."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norm = unscale_and_clip(gradients, loss_scale, max_norm)
    step_if_finite(optimizer, norm)
    return norm


@dataclass
class LossScaler:
    """The factor for the loss in the backward pass. It prevents small fp16 gradients from becoming zero.

    A step is *good* if its gradient norm is finite. After a step that is not good, a dynamic scale is halved. After
    ``GROWTH_INTERVAL`` good steps in a row, it is doubled. A scale that is not dynamic is always 1.
    """

    dynamic: bool
    scale: float = 1.0
    good_steps: int = 0
    world_size: int = 1

    @classmethod
    def for_precision(cls, precision: str, world_size: int = 1) -> LossScaler:
        """Return a loss scaler. For ``amp_fp16``, the scale is dynamic and starts at 2**16. Otherwise, it is 1."""
        dynamic = precision == "amp_fp16"
        return cls(dynamic=dynamic, scale=2.0**16 if dynamic else 1.0, world_size=world_size)

    @property
    def factor(self) -> float:
        """Return the factor for the loss on each rank. The caller must divide the averaged gradients by this factor.

        A dynamic scale is divided by the world size, because the trainer multiplies the loss by the world size. fp16
        gradients then overflow in the same steps at every world size. If the scale is not dynamic, the factor is 1.
        """
        return self.scale / self.world_size if self.dynamic else 1.0

    def update(self, grad_norm: Tensor | float) -> None:
        """Adjust a dynamic scale after a step. This waits until the device has computed ``grad_norm``."""
        if not self.dynamic:
            return
        overflowed = not math.isfinite(grad_norm)
        self.good_steps = 0 if overflowed else self.good_steps + 1
        if overflowed:
            self.scale /= 2
        elif self.good_steps == GROWTH_INTERVAL:
            self.scale *= 2
            self.good_steps = 0

    def restore(self, scale: float | None, good_steps: int) -> None:
        """Restore the values that ``state`` returned.

        Do nothing if ``scale`` is None, or if this scaler is not dynamic.
        """
        if self.dynamic and scale is not None:
            self.scale, self.good_steps = scale, good_steps

    @property
    def state(self) -> tuple[float | None, int]:
        """Return the scale, and the number of good steps since the scale last changed.

        If the scale is not dynamic, the first value is None.
        """
        return (self.scale if self.dynamic else None), self.good_steps
