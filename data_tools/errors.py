"""The errors that a user can cause, shared by every stage."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class UserError(Exception):
    """A mistake or a circumstance that the user can correct.

    Its text is one line: what is wrong, where, and what would be right. The commands print that
    line and exit with ``exit_status``. Any other exception is a defect of this project.
    """

    exit_status = 2


class DataError(UserError):
    """A source, a document, a shard or a manifest that cannot be used."""


@contextmanager
def one_line_write_errors(path: Path) -> Iterator[None]:
    """Turn an ``OSError`` of the block (disk full, no permission, ...) into one line that names ``path``.

    Raises:
        DataError: with the path and the reason.
    """
    try:
        yield
    except OSError as error:
        raise DataError(f"cannot write {path}: {error.strerror or error}") from error


@contextmanager
def one_line_read_errors(path: Path) -> Iterator[None]:
    """Turn an ``OSError`` of the block into one line that names the file, or ``path`` if the error does not.

    Raises:
        DataError: with the path and the reason.
    """
    try:
        yield
    except OSError as error:
        # Arrow's errors have a long text, and some have no number.
        reason = os.strerror(error.errno) if error.errno else str(error).partition("\n")[0]
        raise DataError(f"cannot read {error.filename or path}: {reason}") from error
