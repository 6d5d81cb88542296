"""Print what ended this process, once, before anything that may wait for other ranks."""

import errno
import signal
import socket
import sys
import time
import traceback
from contextlib import suppress

from data_tools.errors import DataError, UserError
from pipeline.distributed.environment import launched_rank, launched_world_size
from pipeline.errors import Interrupted, LostRankError, MainRankError

#: Errors of the operating system that a user can cure although they may not name a file.
_FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG)
#: If rank 0 has the same error, it prints the error and ends, and the launcher ends the other ranks in this time.
_OTHER_RANKS_WAIT_S = 2.0


def report(error: BaseException) -> int:
    """Print an error unless this process has printed it before. Returns the exit status of the error.

    A user's mistake is one line. Anything else is a traceback. Most mistakes, such as a wrong config, are the same on
    all ranks, so the other ranks leave it to rank 0 to print them.
    """
    status, text = _describe(error)
    if not getattr(error, "is_reported", False):
        error.is_reported = True  # type: ignore[attr-defined]
        if launched_rank() and isinstance(error, (Interrupted, MainRankError)):
            return status
        if launched_rank() and isinstance(error, UserError) and not isinstance(error, (DataError, LostRankError)):
            time.sleep(_OTHER_RANKS_WAIT_S)
            text = f"[rank {launched_rank()}] {text}"
        with suppress(BrokenPipeError):
            print(printable(text), file=sys.stderr, flush=True)
    return status


def printable(text: str) -> str:
    """Return text with control characters as escapes, so that a terminal ignores them. Keep line breaks and tabs."""
    return "".join(
        c if c in "\n\t" or c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text
    )


def summarize(error: BaseException) -> str:
    """Return the type and the first line of an error."""
    first_line = next(iter(str(error).strip().splitlines()), "")
    return f"{type(error).__name__}: {first_line}"[:300].rstrip(": ")


def _describe(error: BaseException) -> tuple[int, str]:
    """Return the exit status and what to print."""
    if isinstance(error, UserError):
        return error.exit_status, _one_line("" if isinstance(error, Interrupted) else "error: ", str(error))
    if isinstance(error, KeyboardInterrupt):
        return 128 + signal.SIGINT, "error: interrupted"
    if isinstance(error, OSError) and (error.errno in _FULL_DISK or (error.errno and error.filename)):
        what = f"{error.strerror}: {error.filename2 or error.filename or 'the output folder'}"
        return UserError.exit_status, _one_line("error: ", what)
    text = "".join(traceback.format_exception(error)).rstrip()
    if launched_world_size() > 1:
        text = f"[rank {launched_rank()} on {socket.gethostname()}] {text}"
    return 1, text


def _one_line(prefix: str, message: str) -> str:
    return prefix + " ".join(message.splitlines())
