"""Define the base class of all errors that users can correct, and the error for unusable data."""

import os
import shlex
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

PROJECT = "gpt2-pipeline"
_MOST_NAMES = 20
_LONGEST_NAME = 40


class UserError(Exception):
    """A mistake or a problem that the user can correct.

    The message is one line, which says what is wrong, where it is, and what would be right. A command prints this line
    and exits with the status ``exit_status``. An exception of another class is a bug in this project.
    """

    exit_status = 2


class DataError(UserError):
    """A source, a document, a shard or a manifest cannot be used."""


def json_type(value: object) -> str:
    """Return a description of the type of a JSON value for an error message, such as ``a list``."""
    if isinstance(value, bool | int | float):
        return "true or false" if isinstance(value, bool) else "a number"
    names = {type(None): "null", str: "a string", list: "a list", dict: "an object"}
    return names.get(type(value), f"a {type(value).__name__}")


def list_names(names: Iterable[object]) -> str:
    """Return a text that lists names, for a message. It lists at most 20 names and 40 characters of each name."""
    texts = [str(name) for name in names]
    shown = [text if len(text) <= _LONGEST_NAME else f"{text[:_LONGEST_NAME]}..." for text in texts[:_MOST_NAMES]]
    more = [f"and {len(texts) - _MOST_NAMES} more"] if len(texts) > _MOST_NAMES else []
    return ", ".join([*shown, *more]) or "none"


def install_command(extra: str = "") -> str:
    """Return the shell command that installs this project, for an error message about a missing package.

    If the project runs from a checkout, the command installs the checkout, with the tested versions of the
    dependencies. Otherwise, it installs the published package. The user can run the command in any folder.

    Args:
        extra: the optional dependencies to install, as named in ``pyproject.toml``. Empty for none.
    """
    name = f"[{extra}]" if extra else ""
    root = Path(__file__).resolve().parents[1]
    if not (root / "setup.py").is_file():
        return f"python -m pip install {shlex.quote(PROJECT + name)}"
    constraints = shlex.quote(str(root / "constraints.txt"))
    return f"python -m pip install -c {constraints} -e {shlex.quote(str(root) + name)}"


@contextmanager
def one_line_write_errors(path: Path) -> Iterator[None]:
    """Return a context manager that converts an ``OSError`` of a write, such as a full disk, to a DataError.

    Args:
        path: the file or folder that the ``with`` block writes.

    Raises:
        DataError: the ``with`` block raised ``OSError``. The message is one line with ``path`` and the reason.
    """
    try:
        yield
    except OSError as error:
        raise DataError(f"cannot write {path}: {error.strerror or error}") from error


@contextmanager
def one_line_read_errors(path: Path) -> Iterator[None]:
    """Return a context manager that converts an ``OSError`` of a read to a DataError.

    Raises:
        DataError: the ``with`` block raised ``OSError``. The message is one line. It contains the reason and the
            file that the ``OSError`` names. If the ``OSError`` names no file, the message contains ``path``.
    """
    try:
        yield
    except OSError as error:
        # Arrow's errors have a long text, and some have no number.
        reason = os.strerror(error.errno) if error.errno else str(error).partition("\n")[0]
        raise DataError(f"cannot read {error.filename or path}: {reason}") from error
