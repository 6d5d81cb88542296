"""Accumulate the gradients of the mean loss over the global batch."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pipeline.backends import Backend
from pipeline.config.schema import Config
from pipeline.data.loader import MicroBatch, TrainLoader
from pipeline.distributed.world import World
from pipeline.hardware.device import LateValue
from pipeline.seeds import derive_seed


class GradientAccumulator:
    """Runs the forward and backward passes of a step on this rank's micro-batches.

    The gradients do not depend on the number of ranks and micro-batches, because each loss is divided by the number of
    scored targets in the global batch.
    """

    def __init__(self, backend: Backend, loader: TrainLoader, config: Config, world: World) -> None:
        self.backend = backend
        self.loader = loader
        self.config = config
        self.world = world

    def run(
        self, micro_batches: Sequence[MicroBatch], before_micro_batch: Callable[[str], None]
    ) -> tuple[LateValue, LateValue]:
        """Accumulate the gradients of the micro-batches of one step, without waiting for the device.

        Every rank must call this.

        Args:
            before_micro_batch: is called with a text about each micro-batch before its forward pass.

        Returns:
            The mean loss and the number of scored targets of the global batch. The loss is NaN if no target is scored.
        """
        scored_targets = self._count_scored_targets(micro_batches)
        # A step without scored targets has gradients of zero.
        at_least_one = scored_targets.clamp(min=1) if isinstance(scored_targets, Tensor) else scored_targets
        # Backends average gradients over ranks. Multiplying the loss by the world size turns the average into the sum.
        loss_weight = self.world.size / at_least_one
        loss_sum = torch.zeros((), device=self.world.device)
        for i, micro_batch in enumerate(micro_batches):
            before_micro_batch(f"micro-batch {i + 1} of {len(micro_batches)}")
            if self.config.model.dropout:  # resuming, backend and world size must not change the dropout masks
                torch.manual_seed(derive_seed(self.config.run.seed, "dropout", micro_batch.first_sample))
            tokens, targets = micro_batch.to(self.world.device)
            loss_sum += self.backend.accumulate(tokens, targets, loss_weight, is_last=i == len(micro_batches) - 1)
        # Start the sum over the ranks now. A later sum would wait for all queued steps.
        return LateValue(self.world.sum(loss_sum / scored_targets)), LateValue(scored_targets)

    def _count_scored_targets(self, micro_batches: Sequence[MicroBatch]) -> int | Tensor:
        if not self.loader.has_mask:
            return self.loader.plan.tokens_per_step
        local = sum(micro_batch.scored_targets for micro_batch in micro_batches)
        # torch.tensor would copy from host memory and wait for a GPU.
        return self.world.sum(torch.full((), local, dtype=torch.int64, device=self.world.device))
