"""Run ``launch/train.py`` with slow ranks: first the loader of rank 1 sleeps, then the forward pass of rank 0."""

from __future__ import annotations

import time
from typing import Any

from torch import Tensor

from launch.cli import run_command
from launch.train import main
from pipeline.data.loader import MicroBatch, Prefetcher
from pipeline.distributed.environment import launched_rank
from pipeline.model.gpt2 import GPT2
from pipeline.training.step_guard import TrainedStep
from pipeline.training.trainer import Trainer
from tests.pipeline.training.test_rank_comparison import SLEEP_S, SLOW_STEPS

steps: list[int] = []  # the numbers of the steps that have begun


def count_steps() -> None:
    """Remember the step, because the run also calls the model before it trains."""
    plain = Trainer.train_step

    def train_step(self: Trainer) -> TrainedStep:
        steps.append(self.state.step + 1)
        return plain(self)

    Trainer.train_step = train_step  # type: ignore[method-assign]


def slow_the_loader() -> None:
    """Sleep before the loader returns the micro-batches of each of the first ``SLOW_STEPS`` steps."""
    plain = Prefetcher.micro_batches

    def micro_batches(self: Prefetcher, consumed: int) -> list[MicroBatch]:
        if steps[-1] <= SLOW_STEPS:
            time.sleep(SLEEP_S)
        return plain(self, consumed)

    Prefetcher.micro_batches = micro_batches  # type: ignore[method-assign]


def slow_the_forward_pass() -> None:
    """Sleep before each forward pass of the steps after ``SLOW_STEPS``."""
    plain = GPT2.loss

    def loss(self: GPT2, *arguments: Any) -> Tensor:
        if self.training and steps and steps[-1] > SLOW_STEPS:
            time.sleep(SLEEP_S)
        return plain(self, *arguments)

    GPT2.loss = loss  # type: ignore[method-assign]


if __name__ == "__main__":
    count_steps()
    if launched_rank() == 1:
        slow_the_loader()
    else:
        slow_the_forward_pass()
    run_command(main)
