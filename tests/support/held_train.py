"""``launch/train.py`` that waits after a step for what a test does to it.

Environment: HOLD_AFTER, the step; HOLD_FILE: ranks wait as long as it exists and no signal asks them to stop.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

from launch.cli import run_command
from launch.train import main
from pipeline.training.step_guard import TrainedStep
from pipeline.training.trainer import Trainer

HOLD_AFTER = int(os.environ["HOLD_AFTER"])
HOLD_FILE = Path(os.environ["HOLD_FILE"])
POLL_S = 0.02


def hold_before_the_next_step() -> None:
    """The step before is logged by then."""
    plain_train_step = Trainer.train_step

    def train_step(self: Trainer) -> TrainedStep:
        while self.state.step == HOLD_AFTER and HOLD_FILE.exists() and not self.stop_request.received:
            time.sleep(POLL_S)
        return plain_train_step(self)

    Trainer.train_step = train_step  # type: ignore[method-assign]


if __name__ == "__main__":
    hold_before_the_next_step()
    run_command(main)
