"""Define the interface of a backend. Training, checkpoints and evaluation use only this interface."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from pipeline.backends.optimizer import LossScaler, set_learning_rate
from pipeline.backends.optimizer_state import Fragment, OptimizerState
from pipeline.config.schema import Config
from pipeline.distributed.step_clock import StepClock
from pipeline.distributed.world import World
from pipeline.model.gpt2 import GPT2
from pipeline.model.initialisation import draw_elements
from pipeline.model.output_layer import Method
from pipeline.model.parameter_state import state_names_of

#: (name, start, target): writes fp32 values into ``target``, shape (n,), which is a range of elements of the flattened
#: parameter ``name``. The range begins at element ``start``.
WriteElements = Callable[[str, int, Tensor], None]


class Backend(ABC):
    """A model and its optimizer, distributed over the ranks by a library such as FSDP2.

    The trainer calls ``accumulate`` once per micro-step and ``step`` once per step. A backend averages the gradients
    over the ranks, but training needs their sum. Therefore, the ``loss_weight`` that the trainer passes to
    ``accumulate`` contains the world size as a factor.

    A backend is created from a model on the device ``meta``. It allocates only the weights that this rank holds. The
    weights get their values when ``draw_weights`` or ``write_weights`` is called, or when a checkpoint is loaded.
    """

    compute: nn.Module  # the wrapped module; calling it has the same effect as calling GPT2
    optimizer: torch.optim.Optimizer
    state: OptimizerState

    def __init__(self, model: GPT2, config: Config, world: World) -> None:
        self.model = model
        #: The number of consecutive ranks that together hold one copy of the training state. If there are several
        #: copies, each rank saves a share of its fragments.
        self.ranks_per_copy = config.backend.ranks_per_copy(world.size)
        self.parameter_shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
        self.state_names = state_names_of(self.parameter_shapes, config)
        self.precision = config.run.precision
        self.max_norm = config.optimizer.grad_clip
        self.loss_scaler = LossScaler.for_precision(config.run.precision, world.size)
        self.step_clock = StepClock(world.device, is_active=world.size > 1)

    @abstractmethod
    def accumulate(self, tokens: Tensor, targets: Tensor, loss_weight: Tensor | float, *, is_last: bool) -> Tensor:
        """Run the forward and backward pass of one micro-batch, and add its gradients to the accumulated gradients.

        Returns the sum of the losses of all targets in the micro-batch, as a detached scalar.

        Args:
            tokens: (B, T) int64 ids on the device.
            targets: (B, T) int64 ids. Targets that are ``IGNORE_INDEX`` do not count.
            loss_weight: a factor for the loss. It affects only the gradients, not the returned sum.
            is_last: whether this is the last micro-step of the step. If False, the backend may skip the synchronization
                of gradients between ranks.
        """

    def step(self, learning_rate: float, ema_decay: float | None = None) -> Tensor | float:
        """Unscale and clip the gradients, update the weights, and clear the gradients.

        Call this method after ``accumulate(..., is_last=True)``. If the gradients of any rank are not finite, the step
        is skipped: the weights and the optimizer state do not change, the gradients are cleared, and a dynamic loss
        scale is halved.

        Args:
            learning_rate: the learning rate of this step.
            ema_decay: the decay of the moving average of the weights in this step. None if the run keeps no average.

        Returns:
            The global L2 norm of the unscaled gradients before clipping. All ranks return the same value.
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
        """Do the work of ``step`` at the current learning rate, and return the gradient norm."""

    def draw_weights(self, seed: int) -> None:
        """Set all weights to random initial values. The same seed gives the same weights under every backend.

        This call is collective: every rank must make it. Each rank draws only the weights that it holds.
        """

        def draw(name: str, start: int, target: Tensor) -> None:
            draw_elements(name, self.parameter_shapes[name], self.model.config, seed, start, target)

        self.write_weights(draw)

    @torch.no_grad()
    def write_weights(self, write: WriteElements) -> None:
        """Set all weights to values that the caller chooses.

        This call is collective: every rank must make it, before the first step.

        Args:
            write: a function that is called once for each range of a flattened parameter that this rank holds. It gets
                the name of the parameter, the index of the first element, and the tensor to fill.
        """
        for held in self.state.ranges():
            if held.length:
                write(held.name, held.start, held.of(held.master))
        self.state.publish_masters()

    def fragments(self) -> list[Fragment]:
        """Return the weights and the optimizer state on this rank as fragments.

        A fragment belongs to a range of elements of one parameter. It contains views of the weights and of the
        optimizer state of this range. If the optimizer has not created its state yet, the state is first created and
        filled with zeros.
        """
        return self.state.fragments()

    def state_was_loaded(self, updates: int) -> None:
        """Prepare the backend for training, after the values of a checkpoint were written into the fragments.

        The method sets the optimizer's step count. It also copies the master weights (which the optimizer updates) to
        the weights that the model computes with.

        Args:
            updates: the step count, which is the number of updates since the optimizer's state was zero.
        """
        self.state.set_step_count(updates)
        self.state.publish_masters()

    def dtypes(self) -> dict[str, torch.dtype]:
        """Return the dtypes of the weights, the accumulated gradients and the optimizer state, by name.

        There is one entry for the master weights, which the optimizer updates, and one for the weights that the model
        computes with.
        """
        fragment = self.fragments()[0]
        return {
            "master weights": fragment.weight.dtype,
            "compute weights": torch.bfloat16 if self.precision == "bf16" else fragment.weight.dtype,
            "gradient accumulation": self._accumulation_dtype() or fragment.weight.dtype,
            "optimizer state": next(iter(fragment.state.values())).dtype,
        }

    def _accumulation_dtype(self) -> torch.dtype | None:
        """Return the dtype of accumulated gradients. None means the dtype of the master weights."""
        return None

    @abstractmethod
    def describe(self) -> str:
        """Return a text for the log: the name of the backend, the optimizer, and settings such as the ZeRO stage."""

    @torch.no_grad()
    def __call__(self, *inputs: Any, method: Method) -> Tensor:
        """Call ``GPT2.forward`` without gradients, and return its result.

        This call is collective: every rank must make it.

        Args:
            method: the method that ``GPT2.forward`` calls, such as ``loss``.
        """
        result: Tensor = self.compute(*inputs, method=method)
        return result

    @contextmanager
    def evaluation_mode(self) -> Iterator[None]:
        """Return a context manager that turns dropout off inside its ``with`` block."""
        self.compute.eval()
        try:
            yield
        finally:
            self.compute.train()

    @contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """Return a context manager. Inside its ``with`` block, the model computes with the averages of its weights.

        At the beginning of the block, the weights and their averages are swapped. At the end, they are swapped back.
        Therefore, the block needs no memory for another copy of the weights. Do not save or train inside the block.

        This call is collective: every rank must make it. If the block raises an error, the weights are not swapped
        back, and the run cannot continue.
        """
        self._swap_average()
        yield
        self._swap_average()

    def _swap_average(self) -> None:
        assert self.state.average is not None
        self.state.average.swap()
        self.state.publish_masters()

    @staticmethod
    def weighted(loss: Tensor, factor: Tensor | float) -> Tensor:
        """Return ``loss`` times ``factor``, as the scalar on which to call ``backward``.

        If the loss is not finite, the gradients become NaN, so that every rank skips the step.
        """
        return loss * (factor + loss.detach() * 0.0)

    def close(self) -> None:  # noqa: B027 - most backends have nothing to release
        """Release the resources that the backend uses in this process. After this call, the backend cannot be used.

        This call is not collective.
        """
