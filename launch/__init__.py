"""Define the commands of the pipeline.

Commands parse their arguments before they import slow packages such as torch. ``--help`` and messages about wrong
arguments therefore appear at once.
"""

import signal
import sys
from types import TracebackType

_show_error = sys.excepthook


def _end_after_interrupt(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """End the process in one line if the user presses Ctrl-C while a command imports its modules.

    Later, ``launch.cli.run_command`` handles Ctrl-C.
    """
    if not issubclass(kind, KeyboardInterrupt) or hasattr(sys, "ps1"):  # ps1 exists in an interactive interpreter
        _show_error(kind, error, trace)
        return
    print("error: interrupted", file=sys.stderr)
    sys.exit(128 + signal.SIGINT)


sys.excepthook = _end_after_interrupt  # before the imports below, which take most of the time until run_command

from pipeline.distributed.environment import set_openmp_default  # noqa: E402

set_openmp_default()  # every command imports this package before it imports torch
