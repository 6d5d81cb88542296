"""Read memory use from ``/proc`` (Linux)."""

from __future__ import annotations

import re
from pathlib import Path

_KIB = 1024


def status_bytes(field: str, pid: int | str = "self") -> int:
    """Return a field of ``/proc/<pid>/status`` in bytes, such as ``VmHWM`` (peak resident memory).

    Returns 0 if the process has ended.
    """
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    found = re.search(rf"{field}:\s+(\d+) kB", status)
    return int(found[1]) * _KIB if found else 0
