"""The interface of a backend, which is all that the trainer, the checkpoint and the evaluation know of it."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from pipeline.backends.optimizer import LossScaler, set_learning_rate
from pipeline.backends.optimizer_state import Fragment, OptimizerState
from pipeline.config.schema import Config
from pipeline.model.gpt2 import GPT2
from pipeline.model.output_layer import Method


class Backend(ABC):
    """A wrapped model with its optimizer: forward, backward, gradient synchronization, clipping, step.

    The trainer calls ``accumulate`` once per micro-step and ``step`` once per step. Every backend averages gradients
    over the ranks, so the trainer's loss weight includes the world size.
    """

    #: Whether every rank holds all fragments. A sum over ranks then counts them repeatedly; a save divides them up.
    replicated: bool = False

    compute: nn.Module  # the wrapped module; its forward is that of GPT2
    optimizer: torch.optim.Optimizer
    state: OptimizerState

    def __init__(self, model: GPT2, config: Config) -> None:
        self.model = model
        self.parameter_shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
        self.precision = config.run.precision
        self.max_norm = config.optimizer.grad_clip
        self.loss_scaler = LossScaler.for_precision(config.run.precision)

    @abstractmethod
    def accumulate(self, tokens: Tensor, targets: Tensor, loss_weight: Tensor | float, *, is_last: bool) -> Tensor:
        """Run forward and backward pass of one micro-batch, and return the unweighted summed loss, detached.

        Args:
            tokens: (B, T) int64 ids on the device.
            targets: (B, T) int64 ids, ``IGNORE_INDEX`` where nothing is scored.
            loss_weight: factor on the summed loss before the backward pass.
            is_last: whether this micro-step ends the step; only then do ranks synchronize gradients.
        """

    def step(self, learning_rate: float) -> Tensor | float:
        """Unscale and clip the gradients, update the weights, and clear the gradients.

        If gradients are not finite on any rank, only the loss scale changes: weights, moments and AdamW's step count
        stay as they are. ``accumulate(..., is_last=True)`` must come before.

        Returns:
            The global L2 norm of the unscaled gradients before clipping, the same on every rank.
        """
        set_learning_rate(self.optimizer.param_groups, learning_rate)
        norm = self._update()
        self.loss_scaler.update(norm)
        return norm

    @abstractmethod
    def _update(self) -> Tensor | float:
        """Do the work of ``step`` at the learning rate that is set, and return the norm."""

    def fragments(self) -> list[Fragment]:
        """Return the training state on this rank. Moments that do not exist yet are created as zeros."""
        return self.state.fragments()

    def state_was_loaded(self, updates: int) -> None:
        """Use the fragments that a checkpoint has overwritten, and set AdamW's step count."""
        for state in self.state.adam_states():
            if isinstance(state["step"], Tensor):
                state["step"].fill_(float(updates))
            else:
                state["step"] = updates
        self.state.publish_masters()

    def dtypes(self) -> dict[str, torch.dtype]:
        """Return the dtypes in use: master weights, compute weights, gradient accumulation, moments."""
        fragment = self.fragments()[0]
        return {
            "master weights": fragment.weight.dtype,
            "compute weights": torch.bfloat16 if self.precision == "bf16" else fragment.weight.dtype,
            "gradient accumulation": self._accumulation_dtype() or fragment.weight.dtype,
            "moments": fragment.exp_avg.dtype,
        }

    def _accumulation_dtype(self) -> torch.dtype | None:
        """Return the dtype of accumulated gradients, or None for that of the master weights."""
        return None

    @abstractmethod
    def describe(self) -> str:
        """Return the library, its variant and the optimizer, as logged at the start of a run."""

    @torch.no_grad()
    def __call__(self, *inputs: Any, method: Method) -> Tensor:
        """Return the result of ``GPT2.forward`` without gradients. Every rank must call it equally often."""
        result: Tensor = self.compute(*inputs, method=method)
        return result

    @contextmanager
    def evaluation_mode(self) -> Iterator[None]:
        """Turn dropout off within the context."""
        self.compute.eval()
        try:
            yield
        finally:
            self.compute.train()

    @staticmethod
    def weighted(loss: Tensor, factor: Tensor | float) -> Tensor:
        """Return the loss to call ``backward`` on. A loss that is not finite makes every gradient NaN on every rank."""
        return loss * (factor + loss.detach() * 0.0)

    def close(self) -> None:  # noqa: B027 - most backends have nothing to release
        """Release what would outlive the run. This is the last call; it makes no collectives."""
