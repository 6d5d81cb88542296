"""Define the interface of a backend. Training, checkpoints and evaluation use only this interface."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from pipeline.backends.local_state import Fragment, LocalState
from pipeline.backends.loss_scaler import LossScaler
from pipeline.backends.optimizer import set_learning_rate
from pipeline.config.schema import Config
from pipeline.distributed.step_clock import StepClock
from pipeline.distributed.world import World
from pipeline.errors import EvaluationStopped
from pipeline.model.gpt2 import GPT2
from pipeline.model.initialisation import draw_elements
from pipeline.model.output_layer import Method
from pipeline.model.parameter_state import state_names_of

#: A function of (name, start, target). It fills ``target``, an fp32 tensor of shape (n,), with the elements from
#: ``start`` to ``start + n - 1`` of the flattened parameter ``name``.
WriteElements = Callable[[str, int, Tensor], None]


class Backend(ABC):
    """A model and its optimizer, distributed over the ranks.

    A backend averages the gradients over the ranks. Training needs the sum of the gradients, so the trainer
    multiplies ``loss_weight`` by the world size.

    The model must be on the device ``meta``. A backend allocates only this rank's weights, without values. Before the
    first step, call ``draw_weights`` or ``write_weights``, or load a checkpoint.
    """

    compute: nn.Module  # the wrapped model, with the same ``forward``
    optimizer: torch.optim.Optimizer
    state: LocalState  # this rank's weights and optimizer state

    def __init__(self, model: GPT2, config: Config, world: World) -> None:
        self.model = model
        #: The number of consecutive ranks that together hold one copy of the training state.
        self.ranks_per_copy = config.backend.ranks_per_copy(world.size)
        self.parameter_shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
        self.state_names = state_names_of(self.parameter_shapes, config)
        self.precision = config.run.precision
        self.reduces_in_bf16 = config.backend.reduces_in_bf16(world.size)
        self.max_norm = config.optimizer.grad_clip
        self.loss_scaler = LossScaler.for_precision(config.run.precision, world.size)
        compares_ranks = world.size > 1 and config.logging.slow_rank_ratio is not None
        self.step_clock = StepClock(world.device, is_active=compares_ranks)

    @abstractmethod
    def accumulate(self, tokens: Tensor, targets: Tensor, loss_weight: Tensor | float, *, is_last: bool) -> Tensor:
        """Run the forward and backward pass of one micro-batch, and accumulate its gradients.

        Returns the sum of the losses of the micro-batch's targets, as a detached scalar.

        Args:
            tokens: (B, T) int64 ids.
            targets: (B, T) int64 ids. Targets that are ``IGNORE_INDEX`` do not count.
            loss_weight: a factor for the gradients. It does not change the returned sum.
            is_last: whether this is the last micro-step of the step. If False, ranks need not synchronize gradients.
        """

    def step(self, learning_rate: float, ema_decay: float | None = None) -> Tensor | float:
        """Unscale and clip the gradients, update the weights, and clear the gradients.

        Call this after ``accumulate(..., is_last=True)``. If the gradients of any rank are not finite, the weights and
        the optimizer state do not change.

        Args:
            ema_decay: the decay of the moving average of the weights. None if the run keeps no average.

        Returns:
            The global L2 norm of the unscaled gradients before clipping. It is the same on all ranks.
        """
        set_learning_rate(self.optimizer.param_groups, learning_rate)
        average = self.state.average
        if average is not None:
            average.create()
        norm = self._update()
        self.loss_scaler.update(norm)
        if average is not None:
            assert ema_decay is not None, "a run with an average gives the decay of every step"
            average.update(ema_decay, norm)
        return norm

    @abstractmethod
    def _update(self) -> Tensor | float:
        """Unscale and clip the gradients, update the weights, and clear the gradients. Return the gradient norm."""

    def draw_weights(self, seed: int) -> None:
        """Set all weights to random initial values. The same seed gives the same weights under every backend.

        Every rank must call this.
        """

        def draw(name: str, start: int, target: Tensor) -> None:
            draw_elements(name, self.parameter_shapes[name], self.model.config, seed, start, target)

        self.write_weights(draw, threads=torch.get_num_threads())  # torch draws random numbers with one thread

    @torch.no_grad()
    def write_weights(self, write: WriteElements, threads: int = 1) -> None:
        """Set all weights. Every rank must call this before the first step.

        The method calls ``write(name, start, elements)`` for each range of a parameter that this rank holds. ``write``
        must fill the tensor ``elements``.

        Args:
            threads: the number of threads that call ``write``.
        """
        targets = [(held.name, held.start, held.of(held.master)) for held in self.state.ranges() if held.length]
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(lambda target: write(*target), targets))
        self.state.publish_masters()

    def fragments(self) -> list[Fragment]:
        """Return views of this rank's weights and optimizer state, one fragment per range of a parameter.

        Missing optimizer state is created, filled with zeros.
        """
        return self.state.fragments()

    def state_was_loaded(self, updates: int) -> None:
        """Prepare for training, after the values of a checkpoint were written into the fragments.

        Args:
            updates: the number of updates since the optimizer's state was zero.
        """
        self.state.set_step_count(updates)
        self.state.publish_masters()

    def dtypes(self) -> dict[str, torch.dtype]:
        """Return the dtypes of the weights, the gradients and the optimizer state, by name."""
        fragment = self.fragments()[0]
        return {
            "master weights": fragment.weight.dtype,
            "compute weights": torch.bfloat16 if self.precision == "bf16" else fragment.weight.dtype,
            "gradient accumulation": self._accumulation_dtype() or fragment.weight.dtype,
            "gradient reduction": torch.bfloat16 if self.reduces_in_bf16 else torch.float32,
            "optimizer state": next(iter(fragment.state.values())).dtype,
        }

    def _accumulation_dtype(self) -> torch.dtype | None:
        """Return the dtype of accumulated gradients. None means the dtype of the master weights."""
        return None

    @abstractmethod
    def describe(self) -> str:
        """Return a text for the log: the backend, the optimizer, and settings such as the ZeRO stage."""

    @torch.no_grad()
    def __call__(self, *inputs: Any, method: Method) -> Tensor:
        """Call ``GPT2.forward`` with these arguments, without gradients. Every rank must call this."""
        result: Tensor = self.compute(*inputs, method=method)
        return result

    @contextmanager
    def evaluation_mode(self) -> Iterator[None]:
        """Return a context manager that turns dropout off inside its block."""
        self.compute.eval()
        try:
            yield
        finally:
            self.compute.train()

    @contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """Return a context manager in which the model computes with the averages of its weights.

        Every rank must enter the block. The block needs no memory for a copy of the weights. Do not save or train
        inside the block. After an error in the block, the run cannot continue, except after EvaluationStopped.
        """
        self._swap_average()
        try:
            yield
        except EvaluationStopped:
            self._swap_average()
            raise
        self._swap_average()

    def _swap_average(self) -> None:
        assert self.state.average is not None
        self.state.average.swap()
        self.state.publish_masters()

    @staticmethod
    def weighted(loss: Tensor, factor: Tensor | float) -> Tensor:
        """Return ``loss * factor``, or NaN if the loss is not finite.

        If one rank returns NaN, the gradients of all ranks become NaN, so every rank skips the step.
        """
        return loss * (factor + loss.detach() * 0.0)

    def close(self) -> None:  # noqa: B027 - most backends have nothing to release
        """Release the resources of this process. Do not use the backend afterwards."""
