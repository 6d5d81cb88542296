"""Stage 3: score a checkpoint. Plain python, or torchrun to share the work."""

from __future__ import annotations

from typing import get_args

from launch.cli import ArgumentParser, add_checkpoint_options, positive_int, run_command, start_logging
from pipeline.config import Precision, RunConfig
from pipeline.distributed import join_world
from pipeline.evaluation.results import format_table
from pipeline.evaluation.tasks import TASKS, EvaluationOptions, run_tasks


def main() -> None:
    """Parse, score, print the table and where it was written."""
    parser = ArgumentParser(
        description=__doc__, example="python launch/evaluate.py --checkpoint runs/ddp --tasks validation"
    )
    add_checkpoint_options(parser)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), metavar="TASK", help=f"of {', '.join(TASKS)}")
    parser.add_argument("--data", metavar="DIR", help="token shards (default: those the run was trained on)")
    parser.add_argument(
        "--batch-size", type=positive_int, metavar="N", help="sequences per forward pass; no effect on results"
    )
    parser.add_argument("--precision", choices=get_args(Precision), help="(default: the run's)")
    arguments = parser.parse_args()
    start_logging()
    options = EvaluationOptions(arguments.data, arguments.batch_size, arguments.precision)
    with join_world(RunConfig(device=arguments.device), process_group=False) as world:
        results, folder = run_tasks(arguments.checkpoint, arguments.tasks, options, world)
    if world.is_main:
        print(format_table(results))
        print("wrote " + ", ".join(str(folder / f"{task}.json") for task in results))


if __name__ == "__main__":
    run_command(main)
