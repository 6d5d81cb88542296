"""What the trainer, the checkpoint and the evaluation know of a backend."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn as nn
from torch import Tensor

from pipeline.backends.loss_scaling import LossScaler
from pipeline.model.gpt2 import GPT2, ScoringBatch


@dataclass(frozen=True)
class Fragment:
    """A run of one parameter's elements whose training state is on this rank.

    The tensors are views: writing into them changes the state. A replicated backend has one
    fragment a parameter; FSDP has rows, ZeRO any run of elements.
    """

    name: str  # canonical, as GPT2.named_parameters() gives it
    start: int  # the first element, counted in the flattened parameter
    weight: Tensor  # (n,) fp32 master weights
    exp_avg: Tensor  # (n,) fp32 first moment of AdamW
    exp_avg_sq: Tensor  # (n,) fp32 second moment of AdamW


@dataclass(frozen=True)
class StepResult:
    """One optimizer step."""

    grad_norm: Tensor | float  # global L2 norm of the unscaled gradients, before clipping; the same on every rank
    # Not finite: the update was not applied, and weights, moments and AdamW's count are as they were.


class Backend(ABC):
    """A wrapped model with its optimizer: forward, backward, synchronisation, clipping, step.

    The trainer calls ``accumulate`` once a micro-step and ``step`` once a step. Gradients are
    averaged over the ranks by every backend, so the trainer's loss weight carries the world size.
    """

    #: Whether every rank holds all fragments, so that a checkpoint may divide them among ranks.
    replicated: bool = False

    def __init__(self, model: GPT2, loss_scaler: LossScaler) -> None:
        self.model = model
        self.parameter_shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
        self.loss_scaler = loss_scaler

    @property
    @abstractmethod
    def compute(self) -> nn.Module:
        """The wrapped module; its ``forward`` is that of :class:`GPT2`."""

    @abstractmethod
    def accumulate(self, tokens: Tensor, targets: Tensor, loss_weight: Tensor | float, *, is_last: bool) -> Tensor:
        """Forward and backward of one micro-batch.

        Args:
            tokens: (B, T) int64 ids on the device.
            targets: (B, T) int64 ids, ``IGNORE_INDEX`` where nothing is scored.
            loss_weight: factor on the summed loss before the backward pass.
            is_last: whether this micro-step ends the step; only then do ranks synchronise gradients.

        Returns:
            The unweighted summed loss, detached.
        """

    @abstractmethod
    def step(self, learning_rate: float) -> StepResult:
        """Unscale, clip, update, zero. ``accumulate(..., is_last=True)`` comes before.

        Gradients that are not finite on any rank change nothing but the loss scale.
        """

    @abstractmethod
    def fragments(self) -> list[Fragment]:
        """The training state on this rank. Moments that do not exist yet are made, as zeros."""

    @abstractmethod
    def state_was_loaded(self, updates: int) -> None:
        """Take over fragments that were written from outside, and AdamW's step count."""

    @abstractmethod
    def dtypes(self) -> dict[str, torch.dtype]:
        """The dtypes really in use: master weights, compute weights, gradient accumulation, moments."""

    @abstractmethod
    def describe(self) -> str:
        """The library, its variant and the optimizer, as logged at the start of a run."""

    @torch.no_grad()
    def evaluate(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Return ``GPT2.loss`` without gradients. Every rank must call it equally often."""
        loss: Tensor = self.compute(tokens, targets, method="loss")
        return loss

    @torch.no_grad()
    def logits(self, tokens: Tensor) -> Tensor:
        """Return ``GPT2.logits`` without gradients. Every rank must call it equally often."""
        logits: Tensor = self.compute(tokens, method="logits")
        return logits

    @torch.no_grad()
    def score(self, batch: ScoringBatch) -> Tensor:
        """Return ``GPT2.score`` without gradients. Every rank must call it equally often."""
        scores: Tensor = self.compute(batch, method="score")
        return scores

    @staticmethod
    def weighted(loss: Tensor, factor: Tensor | float) -> Tensor:
        """What to call ``backward`` on: a loss that is not finite makes all gradients so, on every rank."""
        return loss * (factor + loss.detach() * 0.0)

    def close(self) -> None:  # noqa: B027 - most backends have nothing to let go of
        """Let go of what outlives a run. Collectives are over; the last call."""

    @contextmanager
    def evaluation_mode(self) -> Iterator[None]:
        """No dropout inside."""
        self.compute.eval()
        try:
            yield
        finally:
            self.compute.train()
