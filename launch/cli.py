"""What every command shares: one line for a user's mistake, a status, no traceback."""

from __future__ import annotations

import argparse
import errno
import logging
import math
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn, get_args

from data_tools.errors import DataError, UserError
from pipeline.config.schema import Device
from pipeline.distributed.environment import launched_rank, launched_world_size
from pipeline.errors import Interrupted, LostRankError

OWN_ERRORS = (DataError, LostRankError)


class ArgumentParser(argparse.ArgumentParser):
    """argparse with a worked example under ``--help`` and one-line errors; sub-commands are of this class too."""

    def __init__(self, *, description: str, example: str, **of_subcommand: Any) -> None:
        super().__init__(
            description=description,
            epilog=f"example:\n  {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
            **of_subcommand,  # argparse's own: under which name it runs
        )

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see {self.prog} --help)")


def add_config_options(parser: argparse.ArgumentParser) -> None:
    """``--config`` and ``--set``, as every command with a run config has them."""
    parser.add_argument(
        "--config", nargs="+", required=True, metavar="FILE", help="JSON run configs, later ones over earlier ones"
    )
    parser.add_argument(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="SECTION.KEY=VALUE",
        help="overrides over all files, as schedule.max_steps=100",
    )


def add_checkpoint_options(parser: argparse.ArgumentParser) -> None:
    """``--checkpoint`` and ``--device``, as every command that reads a trained model has them."""
    parser.add_argument(
        "--checkpoint",
        required=True,
        type=Path,
        metavar="DIR",
        help="a checkpoint, or a run folder (its newest good one)",
    )
    parser.add_argument("--device", default="auto", choices=get_args(Device), help="(default: %(default)s)")


def positive_int(text: str) -> int:
    """An argparse type: a whole number from 1."""
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a whole number from 1, it is {text!r}") from None
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, it is {value}")
    return value


def non_negative_float(text: str) -> float:
    """An argparse type: a finite number from 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number from 0, it is {text!r}")
    return value


def probability(text: str) -> float:
    """An argparse type: a number above 0, up to 1."""
    value = non_negative_float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"must be above 0 and at most 1, it is {text!r}")
    return value


def some_text(text: str) -> str:
    """An argparse type: at least one character."""
    if not text:
        raise argparse.ArgumentTypeError(
            "an empty text has nothing to find or to continue; give at least one character"
        )
    return text


def start_logging() -> None:
    """Plain lines on standard output from rank 0; other ranks say only what is an error."""
    rank = launched_rank()
    prefix = f"[rank {rank}] " if rank else ""
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter(f"{prefix}%(message)s"))
    for package in ("pipeline", "data_tools", "launch"):
        logger = logging.getLogger(package)
        logger.addHandler(handler)
        logger.setLevel(logging.ERROR if rank else logging.INFO)


def run_command(command: Callable[[], None]) -> NoReturn:
    """Run a command to its exit status: 0 done, otherwise what ``exit_status`` of the error says.

    2: a mistake, or a run that cannot go on; 3: another rank was lost; 128 + n: signal n asked to stop.

    Args:
        command: parses ``sys.argv`` and calls one function of a stage.
    """
    try:
        command()
    except UserError as error:
        # Of a shard or a lost rank each rank has its own to say; the others are the same everywhere.
        quiet = launched_rank() > 0 and not isinstance(error, OWN_ERRORS)
        prefix = "" if isinstance(error, Interrupted) else "error: "
        status = fail(str(error), error.exit_status, prefix=prefix, quiet=quiet)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EFBIG):
            raise
        status = fail(f"{error.strerror}: {error.filename or 'the output folder'}")
    except KeyboardInterrupt:
        status = fail("interrupted", 128 + signal.SIGINT)
    else:
        status = 0
    _leave(status)


def _leave(status: int) -> NoReturn:
    """End the process with a status; all files are closed by now.

    A rank among several skips the interpreter's teardown: a gloo thread that still frees a tensor then asks for the
    GIL, and aborts a process that had finished (pytorch/pytorch#179291, #190489).
    """
    if launched_world_size() == 1:
        sys.exit(status)
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def fail(message: str, status: int = UserError.exit_status, *, prefix: str = "error: ", quiet: bool = False) -> int:
    """Print the one line of an error, unless ``quiet``, and return its exit status."""
    if not quiet:
        print(f"{prefix}{' '.join(message.splitlines())}", file=sys.stderr, flush=True)
    return status
