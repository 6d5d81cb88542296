"""Run ``launch/train.py`` with one rank that fails or stops in the middle of training, as hardware and file systems do.

Environment: STUCK_RANK; STUCK_STEP, the number of finished steps; STUCK_HOW, a name in ``HOW``.
"""

from __future__ import annotations

import os
import time
from typing import Any

import torch
import torch.distributed as dist

from launch.cli import run_command
from launch.train import main
from pipeline.data.loader import Prefetcher
from pipeline.model.gpt2 import GPT2
from pipeline.training.trainer import Trainer

RANK, STEP = int(os.environ["STUCK_RANK"]), int(os.environ["STUCK_STEP"])


def run_out_of_memory(*_: Any) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def sleep_for_ever(*_: Any, **__: Any) -> None:
    print("stuck now", flush=True)
    while True:
        time.sleep(3600)


def break_once(owner: Any, name: str, trainer_of: Any, fault: Any) -> None:
    """Replace a method: call ``fault`` first, on the chosen rank and after the chosen step."""
    plain = getattr(owner, name)

    def broken(self: Any, *arguments: Any, **options: Any) -> Any:
        trainer = trainer_of(self)
        if trainer and trainer.world.rank == RANK and trainer.state.step == STEP:
            fault()
        return plain(self, *arguments, **options)

    setattr(owner, name, broken)


trainers: list[Trainer] = []


def remember_trainer() -> None:
    plain_fit = Trainer.fit

    def fit(self: Trainer) -> None:
        trainers[:] = [self]
        plain_fit(self)

    Trainer.fit = fit  # type: ignore[method-assign]


def current(_: Any) -> Trainer | None:
    return trainers[0] if trainers else None


HOW = {
    "raises": lambda: break_once(Trainer, "train_step", current, run_out_of_memory),
    "step": lambda: break_once(Trainer, "train_step", current, sleep_for_ever),
    "data": lambda: break_once(Prefetcher, "micro_batches", current, sleep_for_ever),
    "forward": lambda: break_once(GPT2, "loss", current, sleep_for_ever),
    "evaluation": lambda: break_once(Trainer, "evaluate", current, sleep_for_ever),
}

if __name__ == "__main__":
    remember_trainer()
    HOW[os.environ["STUCK_HOW"]]()
    dist.destroy_process_group = sleep_for_ever  # as NCCL's does while other ranks are in a collective
    run_command(main)
