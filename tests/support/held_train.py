"""Run ``launch/train.py`` and wait after a given step, so that a test can interfere.

Environment:

- HOLD_AFTER: the step.
- HOLD_FILE: ranks wait while this file exists.
- HOLD_IN: where ranks wait.
    - ``step``: before the next step, at most until a signal asks them to stop.
    - ``save``: inside the save of this step, after the ranks have written their own files.
    - ``evaluation``: inside the evaluation of this step, before its second batch.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from launch.cli import run_command
from launch.train import main
from pipeline.checkpoint import saving
from pipeline.checkpoint.saving import Files, Snapshot
from pipeline.data.loader import MicroBatch
from pipeline.evaluation import validation
from pipeline.training.step_guard import TrainedStep
from pipeline.training.trainer import Trainer

HOLD_AFTER = int(os.environ["HOLD_AFTER"])
HOLD_FILE = Path(os.environ["HOLD_FILE"])
POLL_S = 0.02


def hold_before_the_next_step() -> None:
    """Wait before a step, because the previous step is logged by then."""
    plain_train_step = Trainer.train_step

    def train_step(self: Trainer) -> TrainedStep:
        while self.state.step == HOLD_AFTER and HOLD_FILE.exists() and not self.stop_request.received:
            self.world.progress.move()  # a healthy rank
            time.sleep(POLL_S)
        return plain_train_step(self)

    Trainer.train_step = train_step  # type: ignore[method-assign]


def hold_in_the_save() -> None:
    plain_write = saving.write_tensor_files

    def write(aside: Path, snapshot: Snapshot, rank: int) -> Files:
        files = plain_write(aside, snapshot, rank)
        while snapshot.state.step == HOLD_AFTER and HOLD_FILE.exists():
            time.sleep(POLL_S)
        return files

    saving.write_tensor_files = write


def hold_in_the_evaluation() -> None:
    """Wait before the second batch. Its collective tells all ranks that one rank has received a signal."""
    plain_evaluate, plain_batches = Trainer.evaluate, validation.validation_batches

    def evaluate(self: Trainer) -> None:
        def batches(*arguments: Any) -> Iterator[MicroBatch]:
            for number, batch in enumerate(plain_batches(*arguments)):
                if number == 1 and self.state.step == HOLD_AFTER and HOLD_FILE.exists():
                    print("waits in the evaluation", flush=True)
                while number == 1 and self.state.step == HOLD_AFTER and HOLD_FILE.exists():
                    self.world.progress.move()
                    time.sleep(POLL_S)
                yield batch

        validation.validation_batches = batches
        plain_evaluate(self)

    Trainer.evaluate = evaluate  # type: ignore[method-assign]


HOLDS = {"step": hold_before_the_next_step, "save": hold_in_the_save, "evaluation": hold_in_the_evaluation}

if __name__ == "__main__":
    HOLDS[os.environ["HOLD_IN"]]()
    run_command(main)
