"""Define the errors that users can correct, and helpers that create their messages."""

import os
import shlex
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from data_tools.formatting import printable

PROJECT = "gpt2-pipeline"
_MOST_NAMES = 20
_LONGEST_NAME = 40


class UserError(Exception):
    """A mistake or a problem that the user can correct.

    The message is one line: what is wrong, where, and what would be right. Commands print the message and exit with
    ``exit_status``. Any other exception is a bug.
    """

    exit_status = 2
    #: Whether all ranks of a run raise this error, so that no rank needs to tell it to the others.
    is_known_to_all = False


class DataError(UserError):
    """A source, a document, a shard or a manifest cannot be used."""


def one_line(error: BaseException) -> str:
    """Return the message of an error as one line of at most 300 characters. Without a message, return its type."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def describe_error(error: BaseException) -> str:
    """Return the type of an error and the first line of its message, at most 300 characters."""
    first_line = next(iter(str(error).strip().splitlines()), "")
    return f"{type(error).__name__}: {first_line}"[:300].rstrip(": ")


def json_type(value: object) -> str:
    """Return the type of a JSON value for an error message, such as ``a list``."""
    if isinstance(value, bool | int | float):
        return "true or false" if isinstance(value, bool) else "a number"
    names = {type(None): "null", str: "a string", list: "a list", dict: "an object"}
    return names.get(type(value), f"a {type(value).__name__}")


def list_names(names: Iterable[object]) -> str:
    """Return names as one text for a message: at most 20 names, with at most 40 characters per name."""
    texts = [printable(str(name), line_breaks=False) for name in names]
    shown = [text if len(text) <= _LONGEST_NAME else f"{text[:_LONGEST_NAME]}..." for text in texts[:_MOST_NAMES]]
    more = [f"and {len(texts) - _MOST_NAMES} more"] if len(texts) > _MOST_NAMES else []
    return ", ".join([*shown, *more]) or "none"


def install_command(extra: str = "") -> str:
    """Return the shell command that installs this project, for an error message about a missing package.

    The command installs the checkout if there is one. Otherwise, it installs the published package. ``extra`` is the
    name of a set of optional dependencies, or "".
    """
    name = f"[{extra}]" if extra else ""
    root = Path(__file__).resolve().parents[1]
    if not (root / "setup.py").is_file():
        return f"python -m pip install {shlex.quote(PROJECT + name)}"
    constraints = shlex.quote(str(root / "constraints.txt"))
    return f"python -m pip install -c {constraints} -e {shlex.quote(str(root) + name)}"


@contextmanager
def one_line_write_errors(path: Path) -> Iterator[None]:
    """Return a context manager that converts an ``OSError``, such as a full disk, to a DataError.

    The message of the DataError says that ``path`` could not be written.
    """
    try:
        yield
    except OSError as error:
        raise DataError(f"cannot write {path}: {error.strerror or error}") from error


@contextmanager
def one_line_read_errors(path: Path) -> Iterator[None]:
    """Return a context manager for reading the file ``path``. It converts an ``OSError`` to a DataError."""
    try:
        yield
    except OSError as error:
        name = error.filename or path
        # Arrow's errors have a long text, and some have no number.
        reason = os.strerror(error.errno) if error.errno else str(error).partition("\n")[0]
        if link := describe_broken_link(name):
            reason = f"it {link}"
        raise DataError(f"cannot read {name}: {reason}") from error


def describe_broken_link(path: str | Path) -> str | None:
    """Return the end of an error message if a path is a link to a file that does not exist, otherwise None."""
    if os.path.islink(path) and not os.path.exists(path):
        return f"is a link to {os.readlink(path)}, which does not exist"
    return None
