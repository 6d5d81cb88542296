"""Build the optimizer that the config selects."""

import logging
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pipeline.backends.eager_optimizers import AdamW
from pipeline.backends.muon import Muon, divide_parameters
from pipeline.config.schema import Config, OptimizerConfig
from pipeline.distributed.world import World

log = logging.getLogger(__name__)

FUSED_DEVICES = ("cpu", "cuda", "mps")


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
    match config.optimizer.name:
        case "adamw":
            return build(parameters.values())
        case "muon":
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
    """Set the learning rate of all parameter groups."""
    for group in param_groups:
        group["lr"] = learning_rate
