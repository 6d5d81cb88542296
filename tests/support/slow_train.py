"""Run ``launch/train.py`` with slow ranks: first the loader of rank 1 sleeps, then the forward pass of rank 0."""

from __future__ import annotations

import time
from typing import Any

from torch import Tensor

from launch.cli import run_command
from launch.train import main
from pipeline.data.loader import MicroBatch, TrainLoader
from pipeline.distributed.environment import launched_rank
from pipeline.model.gpt2 import GPT2
from tests.pipeline.training.test_rank_comparison import SLEEP_S, SLOW_STEPS


def slow_the_loader() -> None:
    """The loader reads one step ahead, so it has read all slow steps when the step before the last one begins."""
    plain = TrainLoader.micro_batches

    def micro_batches(self: TrainLoader, consumed: int) -> list[MicroBatch]:
        if consumed // self.plan.samples_per_step < SLOW_STEPS:
            time.sleep(SLEEP_S)
        return plain(self, consumed)

    TrainLoader.micro_batches = micro_batches  # type: ignore[method-assign]


def slow_the_forward_pass() -> None:
    """Sleep once per step, in the training steps after those with a slow loader."""
    plain = GPT2.loss
    calls = [0]

    def loss(self: GPT2, *arguments: Any) -> Tensor:
        calls[0] += self.training
        if self.training and calls[0] > SLOW_STEPS * MICRO_STEPS:
            time.sleep(SLEEP_S / MICRO_STEPS)
        return plain(self, *arguments)

    GPT2.loss = loss  # type: ignore[method-assign]


#: The micro-batches of a rank in a step of ``TINY_RUN`` with two ranks.
MICRO_STEPS = 2

if __name__ == "__main__":
    if launched_rank() == 1:
        slow_the_loader()
    else:
        slow_the_forward_pass()
    run_command(main)
