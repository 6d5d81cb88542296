"""What DDP and FSDP share: torch's AdamW on the model's own parameters."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from pipeline.backends.base import Backend, Fragment, StepResult
from pipeline.backends.loss_scaling import LossScaler
from pipeline.backends.optimizer import build_adamw, set_learning_rate, skip_unless_finite, unscale_and_clip
from pipeline.config.schema import Config
from pipeline.distributed.world import World
from pipeline.model.gpt2 import GPT2


class TorchBackend(Backend):
    """The optimizer half of a backend whose parameters are the fp32 master weights."""

    label: str

    def __init__(self, model: GPT2, config: Config, world: World) -> None:
        super().__init__(model, LossScaler.for_precision(config.run.precision))
        self.max_norm = config.optimizer.grad_clip
        self.parameters = dict(model.named_parameters())
        self.optimizer = build_adamw(self.parameters.values(), config.optimizer, world.device)

    def _backward(self, loss: Tensor, loss_weight: Tensor | float) -> None:
        scaled = self.weighted(loss, loss_weight * self.loss_scaler.scale)
        scaled.backward()  # type: ignore[no-untyped-call]

    def step(self, learning_rate: float) -> StepResult:
        """See :meth:`Backend.step`."""
        set_learning_rate(self.optimizer.param_groups, learning_rate)
        gradients = [parameter.grad for parameter in self.parameters.values() if parameter.grad is not None]
        norm = unscale_and_clip(gradients, self.loss_scaler.scale, self.max_norm)
        if not skip_unless_finite(self.optimizer, norm):
            self.optimizer.step()
        self.loss_scaler.update(norm)
        self._clear_gradients()
        return StepResult(norm)

    def _clear_gradients(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)

    def fragments(self) -> list[Fragment]:
        """See :meth:`Backend.fragments`."""
        return [self._fragment(name, parameter) for name, parameter in self.parameters.items()]

    def _fragment(self, name: str, parameter: Tensor) -> Fragment:
        state = self.optimizer.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        return Fragment(
            name,
            _first_element(parameter),
            _local_elements(parameter),
            _local_elements(state["exp_avg"]),
            _local_elements(state["exp_avg_sq"]),
        )

    def describe(self) -> str:
        """See :meth:`Backend.describe`."""
        return f"{self.label} with {'fused ' if self.optimizer.defaults['fused'] else ''}AdamW"

    def state_was_loaded(self, updates: int) -> None:
        """See :meth:`Backend.state_was_loaded`."""
        for state in self.optimizer.state.values():
            state["step"].fill_(float(updates))


def _first_element(parameter: Tensor) -> int:
    """Where this rank's rows begin in the flattened parameter."""
    if not isinstance(parameter, DTensor):
        return 0
    _, offset = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
    return int(offset[0]) * (parameter.numel() // parameter.shape[0])


def _local_elements(tensor: Tensor) -> Tensor:
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return local.detach().view(-1)
