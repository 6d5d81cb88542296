"""Run ``launch/train.py`` with one rank that fails, hangs or gets a signal in the middle of training.

Environment:

- STUCK_RANK
- STUCK_STEP: the number of finished steps.
- STUCK_WHERE: a name in ``WHERE``.
- STUCK_HOW: a name in ``FAULTS``.
- ABORTING_RANK: a rank that aborts when a collective fails, as NCCL's watchdog does.
"""

from __future__ import annotations

import os
from typing import Any

import torch.distributed as dist

from launch.cli import run_command
from launch.train import main
from pipeline.data.loader import Prefetcher
from pipeline.distributed import failure
from pipeline.distributed.environment import launched_rank
from pipeline.model.gpt2 import GPT2
from pipeline.training import throughput
from pipeline.training.trainer import Trainer
from tests.support.faults import FAULTS, sleep_for_ever

RANK, STEP = int(os.environ["STUCK_RANK"]), int(os.environ["STUCK_STEP"])

#: The function that the rank calls when the fault occurs. "gpu" is the wait for the device before a step is logged.
WHERE: dict[str, tuple[Any, str]] = {
    "step": (Trainer, "train_step"),
    "data": (Prefetcher, "micro_batches"),
    "forward": (GPT2, "loss"),
    "gpu": (throughput, "synchronize"),
}

trainers: list[Trainer] = []


def remember_trainer() -> None:
    plain_fit = Trainer.fit

    def fit(self: Trainer) -> None:
        trainers[:] = [self]
        plain_fit(self)

    Trainer.fit = fit  # type: ignore[method-assign]


def break_once(owner: Any, name: str) -> None:
    """Replace a function: call the fault first, on the chosen rank and after the chosen step."""
    plain = getattr(owner, name)

    def broken(*arguments: Any, **options: Any) -> Any:
        if trainers and trainers[0].world.rank == RANK and trainers[0].state.step == STEP:
            FAULTS[os.environ["STUCK_HOW"]]()
        return plain(*arguments, **options)

    setattr(owner, name, broken)


if __name__ == "__main__":
    remember_trainer()
    break_once(*WHERE[os.environ["STUCK_WHERE"]])
    if os.environ.get("ABORTING_RANK") == str(launched_rank()):
        failure.find_lost = lambda _: os.abort()
    if not os.environ["STUCK_HOW"].startswith("gets "):
        dist.destroy_process_group = sleep_for_ever  # as NCCL's does while other ranks are in a collective
    run_command(main)
