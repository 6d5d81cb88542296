"""What every command shares: one line for a user's mistake, a status, no traceback."""

from __future__ import annotations

import argparse
import errno
import sys
from collections.abc import Callable
from typing import NoReturn

from data_tools.errors import UserError

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130


class ArgumentParser(argparse.ArgumentParser):
    """argparse with a worked example under ``--help`` and one-line errors."""

    def __init__(self, *, description: str, example: str) -> None:
        super().__init__(
            description=description,
            epilog=f"example:\n  {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see {self.prog} --help)")


def run_command(command: Callable[[], None]) -> NoReturn:
    """Run a command to its exit status: 0 done, 2 a user's mistake, 130 interrupted.

    Args:
        command: parses ``sys.argv`` and calls one function of a stage.
    """
    try:
        command()
    except UserError as error:
        status = fail(str(error))
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EFBIG):
            raise
        status = fail(f"{error.strerror}: {error.filename or 'the output folder'}")
    except KeyboardInterrupt:
        status = fail("interrupted", EXIT_INTERRUPTED)
    else:
        status = 0
    sys.exit(status)


def fail(message: str, status: int = EXIT_USER_ERROR) -> int:
    """Print the one line of an error and return its exit status."""
    print(f"error: {message}", file=sys.stderr, flush=True)
    return status
