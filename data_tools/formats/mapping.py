"""Files of other programs, mapped into memory."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pyarrow as pa

from data_tools.errors import DataError
from data_tools.shards.mapping import map_bytes


def map_whole(path: Path) -> pa.Buffer:
    """The bytes of a file, mapped; nothing is read yet.

    Raises:
        DataError: it is missing or cannot be read.
    """
    if path.is_dir():
        raise DataError(f"cannot read {path}: {os.strerror(errno.EISDIR)}")
    try:
        return map_bytes(path) if path.stat().st_size else pa.py_buffer(b"")
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error).splitlines()[0]
        raise DataError(f"cannot read {path}: {reason}") from error
