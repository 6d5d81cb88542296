"""Run tasks of lm-evaluation-harness on a checkpoint. The command also accepts all options of ``lm_eval run``."""

import json
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import get_args

from launch.cli import ArgumentParser, add_weights_option, local_path, run_command, start_logging
from data_tools.errors import UserError, install_command
from pipeline.config.schema import Precision


def main() -> None:
    arguments, others = build_parser().parse_known_args()
    start_logging()
    try:
        from lm_eval.__main__ import cli_evaluate  # optional, and slow to import

        from pipeline.interop.lm_evaluation_harness import HARNESS_MODEL
    except ImportError as error:
        raise UserError(f"lm-evaluation-harness cannot be imported ({error}): {install_command('harness')}") from error
    given = {key: getattr(arguments, key) for key in ("weights", "precision") if getattr(arguments, key)}
    model = {"checkpoint": str(arguments.checkpoint), **given}
    options = ["--model", HARNESS_MODEL, "--model_args", json.dumps(model), "--tasks", *arguments.tasks]
    sys.argv = [sys.argv[0], "run", *options, *others]
    with _one_line_errors():
        cli_evaluate()


def build_parser() -> ArgumentParser:
    """Return the parser of this command's own options, without those of lm-evaluation-harness."""
    parser = ArgumentParser(
        description=f"{__doc__} Examples are --num_fewshot, --limit, --batch_size, --device, --include_path, "
        "--output_path and --log_samples. `lm_eval ls tasks` lists the tasks.",
        example="gpt2-pipeline harness --checkpoint runs/ddp --tasks piqa arc_easy --num_fewshot 5",
    )
    parser.add_argument(
        "--checkpoint",
        required=True,
        type=local_path,
        metavar="DIR",
        help="a checkpoint, or a run folder, whose newest undamaged checkpoint is used",
    )
    add_weights_option(parser)
    parser.add_argument(
        "--precision", choices=get_args(Precision), help="precision of forward passes (default: the run's)"
    )
    parser.add_argument(
        "--tasks", required=True, nargs="+", metavar="TASK", help="tasks or groups of tasks of the harness"
    )
    return parser


@contextmanager
def _one_line_errors() -> Iterator[None]:
    """Return a context manager that converts the harness's errors about options, tasks and downloads to a UserError."""
    try:
        yield
    except (ValueError, ConnectionError) as error:
        *_, (frame, _) = traceback.walk_tb(error.__traceback__)
        if isinstance(error, ValueError) and not frame.f_globals["__name__"].startswith("lm_eval.config."):
            raise
        raise UserError(f"lm_eval: {' '.join(str(error).split())}") from error


if __name__ == "__main__":
    run_command(main)
