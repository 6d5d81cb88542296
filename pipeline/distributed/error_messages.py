"""Print the error that ends this process: only once, and before the process waits for other ranks."""

import re
import signal
import socket
import sys
import threading
import time
import traceback
from contextlib import suppress

from data_tools.errors import DataError, UserError
from data_tools.formatting import printable
from data_tools.storage.atomic import WRITE_ERRORS
from pipeline.distributed.environment import launched_local_rank, launched_rank, launched_world_size
from pipeline.errors import Interrupted, LostRankError, MainRankError

LESS_MEMORY = (
    "To use less memory, lower batch.micro_batch_size (in evaluation: --batch-size), or set run.loss_in_blocks or "
    "model.activation_checkpointing to true. Without dropout, this does not change the training loss."
)
_LONG_WORD = re.compile(r"\S{500,}")
#: The other ranks wait this long before they print an error. If rank 0 has failed, it publishes its error for two
#: seconds (``publish_failure``), and then the launcher ends the ranks of its host.
_OTHER_RANKS_WAIT_S = 4.0
#: With more ranks, only some ranks print a message that is the same on all ranks.
_RANKS_THAT_ALL_PRINT = 64


def report(error: BaseException) -> int:
    """Print an error, unless it was printed before. Return the exit status of the process.

    A ``UserError`` is printed as one line, any other error with a traceback.

    A ``UserError`` is often the same on all ranks, for example after a wrong config. Rank 0 prints it at once. The
    other ranks wait for four seconds, so that the launcher can end them before they print.

    For a ``DataError`` or a ``LostRankError``, no rank waits. ``prints_for_node`` decides which ranks print a
    ``LostRankError``. One rank on each host without rank 0 prints a ``MainRankError``.
    """
    status, text = _describe(error)
    if getattr(error, "is_reported", False):
        return status
    error.is_reported = True  # type: ignore[attr-defined]
    if isinstance(error, LostRankError):
        if not prints_for_node():
            return status
    elif launched_rank() and isinstance(error, UserError):
        if isinstance(error, Interrupted) or (isinstance(error, MainRankError) and launched_local_rank()):
            return status
        if not isinstance(error, (DataError, MainRankError)):
            _wait_for_end()
        text = f"[rank {launched_rank()} on {socket.gethostname()}] {text}"
    print_error(printable(text))
    return status


def print_error(text: str) -> None:
    """Print a text to standard error. If this is not possible, the text is lost.

    For example, the terminal was closed, the reader of a pipe has ended, or the disk of a log file is full. The caller
    must still end the process.
    """
    with suppress(OSError):
        print(text, file=sys.stderr, flush=True)


def prints_for_node() -> bool:
    """Return whether this rank should print a message that is the same on all ranks.

    With up to 64 ranks, every rank prints the message. With more ranks, two ranks per node print it, because the output
    of one rank can be lost.
    """
    return launched_world_size() <= _RANKS_THAT_ALL_PRINT or launched_local_rank() < 2


def _wait_for_end() -> None:
    """Wait four seconds, so that the launcher can end this process.

    A process that ends during the wait does not repeat the error that rank 0 has printed. During the wait, SIGTERM ends
    the process at once. The run's own handler might wait longer.
    """
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    time.sleep(_OTHER_RANKS_WAIT_S)


def _describe(error: BaseException) -> tuple[int, str]:
    """Return the exit status for an error and the text to print."""
    if isinstance(error, UserError):
        return error.exit_status, _one_line("" if isinstance(error, Interrupted) else "error: ", str(error))
    if isinstance(error, KeyboardInterrupt):
        return 128 + signal.SIGINT, "error: interrupted"
    if isinstance(error, OSError) and (error.errno in WRITE_ERRORS or (error.errno and error.filename)):
        what = f"{error.strerror}: {error.filename2 or error.filename or 'the output or a temporary file'}"
        return UserError.exit_status, _one_line("error: ", what)
    text = "".join(traceback.format_exception(error)).rstrip()
    # Torch's error for a GPU and its error for a CPU. This module does not import torch.
    if type(error).__name__ == "OutOfMemoryError" or "DefaultCPUAllocator: can't allocate memory" in str(error):
        text += f"\n{LESS_MEMORY}"
    if launched_world_size() > 1:
        text = f"[rank {launched_rank()} on {socket.gethostname()}] {text}"
    return 1, text


def _one_line(prefix: str, message: str) -> str:
    """Return a message as one line. In very long words, ``[...]`` replaces the middle."""
    line = prefix + " ".join(message.splitlines())
    return _LONG_WORD.sub(lambda word: f"{word[0][:100]}[...]{word[0][-100:]}", line)
