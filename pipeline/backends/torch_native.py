"""Define the base class of the DDP and FSDP2 backends."""

from abc import abstractmethod
from contextlib import AbstractContextManager

import torch.nn as nn
from torch import Tensor

from pipeline.backends.base import Backend
from pipeline.backends.gradient_clipping import clip_and_step
from pipeline.backends.local_state import LocalState, ParameterState
from pipeline.backends.optimizer import build_optimizer, describe_optimizer
from pipeline.config.schema import Config
from pipeline.distributed.world import World
from pipeline.model.gpt2 import GPT2


class TorchBackend(Backend):
    """A backend whose optimizer updates the fp32 parameters of the model. Subclasses synchronize the gradients."""

    label: str

    def __init__(self, model: GPT2, compute: nn.Module, config: Config, world: World) -> None:
        super().__init__(model, config, world)
        self.compute = compute
        self.parameters: dict[str, Tensor] = dict(model.named_parameters())
        self.optimizer = build_optimizer(self.parameters, config, world)
        self.state = self._create_state()
        self.state.connect_optimizer(self.ranks_per_copy)

    def accumulate(self, tokens: Tensor, targets: Tensor, loss_weight: Tensor | float, *, is_last: bool) -> Tensor:
        with self._gradient_sync(is_last):
            loss = self.compute(tokens, targets)
            self._run_backward_pass(self.weighted(loss, loss_weight * self.loss_scaler.factor))
        return loss.detach()

    def _run_backward_pass(self, loss: Tensor) -> None:
        loss.backward()  # type: ignore[no-untyped-call]

    def _create_state(self) -> LocalState:
        return ParameterState(self.optimizer, self.parameters, self.state_names)

    @abstractmethod
    def _gradient_sync(self, enabled: bool) -> AbstractContextManager[None]:
        """Return the context for a forward and a backward pass. If ``enabled``, the ranks synchronize gradients."""

    def _update(self) -> Tensor:
        norm = clip_and_step(self.optimizer, self.parameters.values(), self.loss_scaler.factor, self.max_norm)
        self._clear_gradients()
        return norm

    def _clear_gradients(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)

    def describe(self) -> str:
        return f"{self.label} with {describe_optimizer(self.optimizer)}"
