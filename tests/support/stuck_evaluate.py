"""Run ``launch/evaluate.py`` with one rank that stops at its second batch of the validation split.

Environment: STUCK_RANK; STUCK_HOW, a name in ``FAULTS``.
"""

from __future__ import annotations

import os
from typing import Any

from launch.cli import run_command
from launch.evaluate import main
from pipeline.distributed.environment import launched_rank
from pipeline.evaluation import validation
from tests.support.faults import FAULTS

batches = 0


def break_second_batch() -> None:
    plain = validation._sum_batch

    def sum_batch(*arguments: Any) -> Any:
        global batches
        batches += 1
        if batches == 2 and launched_rank() == int(os.environ["STUCK_RANK"]):
            FAULTS[os.environ["STUCK_HOW"]]()
        return plain(*arguments)

    validation._sum_batch = sum_batch


if __name__ == "__main__":
    break_second_batch()
    run_command(main)
