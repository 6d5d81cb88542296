"""The output folder of a conversion."""

from __future__ import annotations

import os
from pathlib import Path

from data_tools.errors import DataError, one_line_write_errors


def require_new(out: Path) -> None:
    """Check that a folder does not exist yet, or is empty.

    Raises:
        DataError: it is a file or a mount point, or is not empty.
    """
    if out.exists() and not out.is_dir():
        raise DataError(f"--out {out} is a file; name a folder")
    if os.path.ismount(out):
        raise DataError(f"--out {out} is a mount point; name a new folder in it")
    with one_line_write_errors(out):
        names = sorted(path.name for path in out.iterdir()) if out.exists() else []
    if names:
        raise DataError(f"--out {out} is not empty (it holds {names[0]}); name a new or empty folder")
