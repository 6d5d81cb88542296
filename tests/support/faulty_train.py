"""Run ``launch/train.py`` with a fault: multiply the loss of micro-batches that begin with given samples.

Environment: FAULTY_SAMPLES, global sample indices ("12" or "12,13"), and FAULT, the factor ("nan", "inf", "50").
"""

from __future__ import annotations

import os
from typing import Any

from torch import Tensor

from launch.cli import run_command
from launch.train import main
from pipeline.data.loader import MicroBatch
from pipeline.model.gpt2 import GPT2

FAULTY_SAMPLES = {int(sample) for sample in os.environ["FAULTY_SAMPLES"].split(",")}
FAULT = float(os.environ["FAULT"])

current: list[MicroBatch] = []


def remember_micro_batch() -> None:
    """Remember the current micro-batch, because the model sees tokens but no sample numbers."""
    plain_to = MicroBatch.to

    def to(self: MicroBatch, *arguments: Any) -> Any:
        current[:] = [self]
        return plain_to(self, *arguments)

    MicroBatch.to = to  # type: ignore[method-assign, assignment]


def break_the_loss() -> None:
    """Multiply the loss, but not in validation, where every batch has ``first_sample`` 0."""
    plain_loss = GPT2.loss

    def faulty_loss(self: GPT2, tokens: Tensor, targets: Tensor) -> Tensor:
        loss = plain_loss(self, tokens, targets)
        faulty = self.training and current and current[0].first_sample in FAULTY_SAMPLES
        return loss * FAULT if faulty else loss

    GPT2.loss = faulty_loss  # type: ignore[method-assign]


if __name__ == "__main__":
    remember_micro_batch()
    break_the_loss()
    run_command(main)
