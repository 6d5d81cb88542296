"""Read memory use from ``/proc`` (Linux)."""

from __future__ import annotations

import re
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import psutil

_POLL_S = 0.3


def status_bytes(field: str, pid: int | str = "self") -> int:
    """Return a field of ``/proc/<pid>/status`` in bytes, such as ``VmHWM`` (peak resident memory).

    Returns 0 if the process has ended.
    """
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    found = re.search(rf"{field}:\s+(\d+) kB", status)
    return int(found[1]) * 1024 if found else 0


def watch_peak_bytes(process: subprocess.Popen[bytes]) -> int:
    """Wait until a process ends. Return the largest peak of resident bytes of the process or of a descendant."""
    peak = 0
    while process.poll() is None:
        with suppress(psutil.NoSuchProcess):
            children = psutil.Process(process.pid).children(recursive=True)
            pids = [process.pid, *(child.pid for child in children)]
            peak = max([peak, *(status_bytes("VmHWM", pid) for pid in pids)])
        time.sleep(_POLL_S)
    return peak
