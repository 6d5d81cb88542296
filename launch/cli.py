"""Define what all commands have in common: options, one-line error messages, and exit statuses."""

import argparse
import faulthandler
import gc
import io
import logging
import math
import os
import re
import shlex
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from decimal import Decimal
from pathlib import Path
from typing import Any, NoReturn, TextIO, TypeVar, get_args

from data_tools.errors import UserError
from data_tools.storage.files import is_remote
from data_tools.threads import lock_bars_among_threads
from pipeline.distributed.environment import launched_rank, launched_world_size, wants_colours
from pipeline.distributed.error_messages import report
from pipeline.run_folder.log_file import LOGGED_PACKAGES

_T = TypeVar("_T")


class _StoreEveryValue(argparse.Action):
    """Joins the values if an option with several values is repeated. Any other repeated option is an error."""

    was_given = False  # whether the current command line has contained this option

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        if self.was_given and self.nargs not in ("+", "*"):
            raise argparse.ArgumentError(self, "is given more than once; give it once")
        if self.was_given:
            values = [*getattr(namespace, self.dest), *values]
        self.was_given = True
        setattr(namespace, self.dest, values)


class ArgumentParser(argparse.ArgumentParser):
    """An argument parser whose ``--help`` shows an example, and whose error messages have one line.

    The example is a command line that begins with ``gpt2-pipeline``.
    """

    def __init__(self, *, description: str, example: str, **options: Any) -> None:
        super().__init__(
            description=description,
            epilog=f"example:\n  {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
            **options,  # argparse passes these options when it creates a sub-command
        )
        self.register("action", None, _StoreEveryValue)

    def parse_known_args(self, *arguments: Any, **options: Any) -> Any:
        """Parse a command line. Forget the values that an earlier call has collected."""
        for action in self._actions:
            if isinstance(action, _StoreEveryValue):
                action.was_given = False
        return super().parse_known_args(*arguments, **options)

    def parse_args(self, *arguments: Any, **options: Any) -> Any:
        """Parse a command line. For an unknown option that has the name of a config key, the error names ``--set``."""
        parsed, unknown = self.parse_known_args(*arguments, **options)
        if unknown:
            advice = _advise_setting(unknown) if "--set" in self._option_string_actions else ""
            self.error(f"unrecognized arguments: {' '.join(unknown)}{advice}")
        return parsed

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see {self.prog} --help)")


def _advise_setting(unknown: Sequence[str]) -> str:
    """Return advice for ``--learning_rate=1e-3`` or ``--learning_rate 1e-3``, or "" if no config key has this name."""
    from pipeline.config.keys import find_key

    option, equals, value = unknown[0].partition("=")
    section, _, name = option.lstrip("-").replace("-", "_").rpartition(".")
    key = find_key(section, name) or ""
    if not option.startswith("--") or "." not in key:  # without a dot, it is a section
        return ""
    if not equals:
        value = unknown[1] if len(unknown) > 1 and not unknown[1].startswith("--") else "VALUE"
    return f"; config keys are given with --set, as in --set {shlex.quote(f'{key}={value}')}"


def add_config_options(parser: argparse.ArgumentParser) -> None:
    """Add the options with which a command receives its run config."""
    parser.add_argument(
        "--config",
        nargs="+",
        required=True,
        metavar="FILE",
        help="JSON run configs, or names of shipped ones such as zero1; later files override earlier files",
    )
    parser.add_argument(
        "--set",
        nargs="+",
        default=[],
        metavar="SECTION.KEY=VALUE",
        help="values that override all files, such as schedule.max_steps=100",
    )
    parser.add_argument(
        "--deepspeed",
        metavar="FILE",
        help="DeepSpeed's own JSON; sets backend.name=deepspeed and adds the file to backend.deepspeed",
    )


def config_options(arguments: argparse.Namespace, overrides: Sequence[str] = ()) -> list[str]:
    """Return the options of ``add_config_options`` for another command, with more values for ``--set``."""
    options = ["--config", *arguments.config]
    options += ["--set", *values] if (values := [*arguments.set, *overrides]) else []
    return options + (["--deepspeed", arguments.deepspeed] if arguments.deepspeed else [])


def add_checkpoint_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that select a checkpoint, its trained or averaged weights, and the device."""
    from pipeline.config.schema import Device

    parser.add_argument(
        "--checkpoint",
        required=True,
        type=path_or_url,
        metavar="DIR",
        help="a checkpoint, or a run folder, whose newest undamaged checkpoint is used; also a URL, such as "
        "s3://bucket/run",
    )
    add_weights_option(parser)
    parser.add_argument("--device", default="auto", choices=get_args(Device), help="the device (default: %(default)s)")


def add_weights_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--weights",
        default="training",
        choices=("training", "ema"),
        help="the weights that are trained, or ema, their moving average (averaging.ema) (default: %(default)s)",
    )


def local_path(text: str) -> Path:
    """Return a path without a leading ~. The shell does not replace the ~ in ``--out=~/folder``."""
    return Path(os.path.expanduser(text))


def path_or_url(text: str) -> Path | str:
    """Return a URL unchanged, and any other text as a path."""
    return text if is_remote(text) else local_path(text)


def _option_type(parse: Callable[[str], _T], is_valid: Callable[[_T], bool], expected: str) -> Callable[[str], _T]:

    def parse_option(text: str) -> _T:
        with suppress(ValueError, ArithmeticError):
            value = parse(text)
            if is_valid(value):
                return value
        raise argparse.ArgumentTypeError(f"must be {expected}, it is {text!r}")

    return parse_option


def _valid_text(text: str) -> str:
    text.encode()  # raises ValueError for invalid bytes, because Python has decoded them to surrogates
    return text


def _parse_count(text: str) -> int:
    """Return 10 billion for 10B, 10e9 and 10,000,000,000. Raises ValueError if the text is not a whole number."""
    factor = {"K": 10**3, "M": 10**6, "B": 10**9, "G": 10**9, "T": 10**12}.get(text[-1:].upper(), 1)
    count = Decimal(text.replace(",", "").replace("_", "").removesuffix(text[-1] if factor > 1 else "")) * factor
    if count != int(count):
        raise ValueError
    return int(count)


def _parse_bandwidth(text: str) -> float:
    """Return 400 for 400gbit, and 3200 for 8x400gbit. Raises ValueError if the text is not a bandwidth."""
    found = re.fullmatch(r"(?:(\d+)x)?(\d+(?:\.\d+)?) ?([mgt])bit(?:/s)?", text.strip().lower())
    if not found:
        raise ValueError
    count, value, unit = found.groups()
    return int(count or 1) * float(value) * {"m": 1e-3, "g": 1.0, "t": 1e3}[unit]


positive_int = _option_type(int, lambda value: value >= 1, "a whole number from 1")
positive_number = _option_type(float, lambda value: 0 < value < math.inf, "a number above 0, without a unit")
token_count = _option_type(_parse_count, lambda value: value >= 1, "a whole number such as 5000000, 10B or 10e9")
#: In Gbit/s.
bandwidth = _option_type(
    _parse_bandwidth, lambda value: value > 0, "a bandwidth such as 400gbit, or 8x400gbit for eight adapters"
)
non_negative_float = _option_type(float, lambda value: 0 <= value < math.inf, "a number from 0")
probability = _option_type(float, lambda value: 0 < value <= 1, "above 0 and at most 1")
valid_text = _option_type(_valid_text, lambda _: True, "valid text")
non_empty_text = _option_type(_valid_text, bool, "at least one character of valid text")


class _PipeHandler(logging.StreamHandler[TextIO]):
    """Writes log lines above the progress bars.

    If standard output is a pipe without a reader or a file on a full disk, the lines are lost.
    """

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm

        with tqdm.external_write_mode(file=self.stream):
            super().emit(record)

    def handleError(self, record: logging.LogRecord) -> None:
        """Print an error. If standard output cannot be written, print nothing."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)


class _MarkingFormatter(logging.Formatter):
    """Begins the line of a warning with ``warning:``. On a terminal with colours, the line is highlighted."""

    def format(self, record: logging.LogRecord) -> str:
        line = super().format(record)
        if record.levelno < logging.WARNING:
            return line
        line = f"{record.levelname.lower()}: {line}"
        return highlighted(line) if shows_colours(sys.stdout) else line


def highlighted(text: str) -> str:
    return f"\033[1;33m{text}\033[0m"


def print_warning(text: str) -> None:
    line = f"warning: {text}"
    print(highlighted(line) if shows_colours(sys.stderr) else line, file=sys.stderr)


def shows_colours(stream: TextIO) -> bool:
    """Return whether a stream is a terminal with colours and the user allows colours."""
    return stream.isatty() and wants_colours()


def start_logging() -> None:
    """Write log messages to standard output, above the progress bars.

    Rank 0 logs all messages, the other ranks only errors.
    """
    lock_bars_among_threads()
    rank = launched_rank()
    prefix = f"[rank {rank}] " if rank else ""
    handler = _PipeHandler(sys.stdout)
    handler.setFormatter(_MarkingFormatter(f"{prefix}%(message)s"))
    for package in LOGGED_PACKAGES:
        logger = logging.getLogger(package)
        logger.addHandler(handler)
        logger.setLevel(logging.ERROR if rank else logging.INFO)


@contextmanager
def quick_imports() -> Iterator[None]:
    """Return a context manager for faster imports: the garbage collector ignores objects that the block creates."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def run_command(command: Callable[[], object]) -> NoReturn:
    """Run a command. Exit with status 0 if it succeeds, otherwise with the ``exit_status`` of its error.

    Exit statuses:

    - 1: an unexpected error;
    - 2: a mistake of the user, or a run that cannot continue;
    - 3: a rank is lost or stuck;
    - 128 + n: the signal n stopped the command;
    - 128 + SIGPIPE: the program that read the output, such as ``head``, has ended.
    """
    status = 0
    _open_missing_streams()
    with suppress(OSError, ValueError):  # standard error may be closed
        # After a crash in native code, for example SIGBUS because a mapped file was cut, Python prints its traceback.
        faulthandler.enable(2)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # tests may replace the stream with an object of another type
            stream.reconfigure(errors="backslashreplace")
    # Keep the command's result and the error's traceback until the process ends, because they may refer to DDP's
    # reducer. Freeing the reducer can hang: it waits for gloo's threads, and one of them may wait for the GIL.
    kept: list[object] = []
    try:
        kept.append(command())
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BrokenPipeError:
        status = 128 + signal.SIGPIPE
    except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001 - reported, and the process ends
        kept.append(error)
        status = report(error)
    _exit(_flush_stdout(status))


def _open_missing_streams() -> None:
    """Open standard streams that are closed, for example by ``>&-`` or by a daemon. Their output is lost."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115 - open until the process ends


def _flush_stdout(status: int) -> int:
    """Flush standard output, and return ``status``.

    If the reader of a pipe has ended, return the status of SIGPIPE. If the disk is full, print this error, and return
    its status.
    """
    try:
        sys.stdout.flush()
    except OSError as error:
        # The interpreter flushes once more when it ends, and would print another error.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE if isinstance(error, BrokenPipeError) else status or report(error)
    return status


def _exit(status: int) -> NoReturn:
    """End the process after all files are closed.

    The last garbage collections of the interpreter skip all objects, because the end of the process frees them anyway.
    With several ranks, skip the shutdown of the interpreter. If a gloo thread requests the GIL during the shutdown, the
    process aborts (pytorch/pytorch#179291, #190489).
    """
    gc.freeze()
    if launched_world_size() == 1:
        sys.exit(status)
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
