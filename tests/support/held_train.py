"""Run ``launch/train.py`` and wait after a given step, so that a test can interfere.

Environment:

- HOLD_AFTER: the step.
- HOLD_FILE: ranks wait while this file exists and no signal has asked them to stop.
- HOLD_IN_SAVE: if it is 1, ranks wait inside the save of this step, after they have written their own files.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

from launch.cli import run_command
from launch.train import main
from pipeline.checkpoint import saving
from pipeline.checkpoint.saving import Files, Snapshot
from pipeline.training.step_guard import TrainedStep
from pipeline.training.trainer import Trainer

HOLD_AFTER = int(os.environ["HOLD_AFTER"])
HOLD_FILE = Path(os.environ["HOLD_FILE"])
HOLD_IN_SAVE = os.environ.get("HOLD_IN_SAVE") == "1"
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


if __name__ == "__main__":
    if HOLD_IN_SAVE:
        hold_in_the_save()
    else:
        hold_before_the_next_step()
    run_command(main)
