"""Stage 3: score a checkpoint. Start it with plain python, or with torchrun to share the work among processes."""

import argparse
from typing import TypeVar, get_args

from launch.cli import (
    ArgumentParser,
    add_checkpoint_options,
    local_path,
    positive_int,
    quick_imports,
    run_command,
    start_logging,
)
from pipeline.config.schema import TASK_NAME, Precision, RunConfig, TaskName
from pipeline.evaluation.results import format_table

_T = TypeVar("_T")

EVERY_TASK = ""  # the key of a limit that is given without a task


def main() -> None:
    arguments = parse_arguments()
    with quick_imports():
        from pipeline.distributed.heartbeat import heartbeat
        from pipeline.distributed.world import join_world
        from pipeline.evaluation.examples import Settings
        from pipeline.evaluation.run import run_tasks

    start_logging()
    limits = dict(arguments.limit)
    settings = Settings(arguments.shots, limits.pop(EVERY_TASK, None), arguments.stride, limits)
    run = RunConfig(device=arguments.device, rank_timeout_s=arguments.rank_timeout)
    joined = join_world(run, process_group=False, device_option="--device")
    with joined as world, heartbeat(world, run.rank_timeout_s):
        _, written = run_tasks(
            arguments.checkpoint,
            arguments.tasks,
            settings,
            world,
            paths=arguments.data,
            batch_size=arguments.batch_size,
            precision=arguments.precision,
            weights=arguments.weights,
            examples_file=arguments.save_examples,
            out=arguments.out,
            show=lambda results: print(format_table(results), flush=True),
        )
    if written:
        print("wrote " + ", ".join(map(str, written)))


def parse_arguments() -> argparse.Namespace:
    """Return the parsed options. ``data`` and ``limit`` are dicts whose keys are tasks."""
    parser = build_parser()
    arguments = parser.parse_args()
    arguments.data = _by_task(parser, "--data", arguments.data)
    arguments.limit = _by_task(parser, "--limit", arguments.limit)
    return arguments


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(
        description=__doc__, example="gpt2-pipeline evaluate --checkpoint runs/ddp --tasks validation"
    )
    add_checkpoint_options(parser)
    _add_task_options(parser)
    parser.add_argument(
        "--batch-size",
        type=positive_int,
        metavar="N",
        help="full sequences per forward pass; does not change the results (default: the run's)",
    )
    parser.add_argument(
        "--precision", choices=get_args(Precision), help="precision of forward passes (default: the run's)"
    )
    parser.add_argument(
        "--save-examples",
        type=local_path,
        metavar="FILE",
        help="write the log-likelihoods, the choice and the right choice of each example, one JSON object per line",
    )
    parser.add_argument(
        "--out", type=local_path, metavar="DIR", help="folder for the results (default: evaluation/ in the run folder)"
    )
    parser.add_argument(
        "--rank-timeout",
        type=positive_int,
        default=RunConfig().rank_timeout_s,
        metavar="SECONDS",
        help="end if a process is silent or makes no progress for this time (default: %(default)s)",
    )
    return parser


def _add_task_options(parser: ArgumentParser) -> None:
    names = ", ".join(get_args(TaskName))
    parser.add_argument(
        "--tasks",
        nargs="+",
        default=["validation"],
        metavar="TASK",
        help=f"{names}, or any name given to --data (default: validation)",
    )
    parser.add_argument(
        "--data",
        nargs="+",
        default=[],
        type=_task_and_path,
        metavar="TASK=PATH",
        help="a task's .jsonl, .parquet or text file (default: from the run's config, or from the Hugging Face hub); "
        "for validation, a folder of token shards (default: the run's data)",
    )
    parser.add_argument(
        "--shots", type=positive_int, default=0, metavar="N", help="solved examples before each example (default: 0)"
    )
    parser.add_argument(
        "--limit",
        nargs="+",
        default=[],
        type=_limit,
        metavar="[TASK=]N",
        help="score only the first N examples of each task, or of one task",
    )
    parser.add_argument(
        "--stride",
        type=positive_int,
        metavar="N",
        help="tokens between the starts of windows over a text (default: the model's context, without overlap)",
    )


def _task_and_path(assignment: str) -> tuple[str, str]:
    task, _, path = assignment.partition("=")
    if not (task and path):
        raise argparse.ArgumentTypeError(f"{assignment}: expected TASK=PATH, as in --data validation=DIR")
    if not TASK_NAME.fullmatch(task):
        raise argparse.ArgumentTypeError(f"{assignment}: a task's name may have only letters, digits and . _ -")
    return task, path


def _by_task(parser: ArgumentParser, option: str, values: list[tuple[str, _T]]) -> dict[str, _T]:
    by_task = dict(values)
    for task in by_task:
        if [name for name, _ in values].count(task) > 1:
            parser.error(f"{option}: {task or 'every task'} is given more than once; give it once")
    return by_task


def _limit(text: str) -> tuple[str, int]:
    """Return (task, N) for ``TASK=N``. For ``N`` alone, the task is ``EVERY_TASK``."""
    task, _, number = text.rpartition("=")
    return task, positive_int(number)


if __name__ == "__main__":
    run_command(main)
