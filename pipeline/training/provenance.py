"""Describe the program and the machine at the start of a run."""

import platform
import shlex
import socket
import subprocess
import sys
from datetime import datetime
from pathlib import Path
from typing import Any

from pipeline.checkpoint.saving import package_versions
from pipeline.distributed.environment import launcher_name

_LONGEST_GIT_S = 10.0  # git can be slow in a large repository on a network disk


def describe_process() -> dict[str, Any]:
    """Describe this process: the time, the command, the host, the launcher, the packages, and the git commit.

    The values of the keys ``launcher`` and ``git`` can be None.
    """
    return {
        "time": datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": shlex.join([Path(sys.executable).name, *sys.orig_argv[1:]]),
        "host": socket.gethostname(),
        "launcher": launcher_name(),
        "python": platform.python_version(),
        "packages": package_versions(),
        "git": describe_commit(Path.cwd()),
    }


def describe_commit(folder: Path) -> dict[str, Any] | None:
    """Return the git commit of a folder, and whether tracked files differ from it (``dirty``).

    Returns None if the folder is not in a git repository, if the repository has no commit, or if git fails.
    """
    commit = _run_git(folder, "rev-parse", "HEAD")
    changes = _run_git(folder, "status", "--porcelain", "--untracked-files=no")
    if commit is None or changes is None:
        return None
    return {"commit": commit, "dirty": bool(changes)}


def _run_git(folder: Path, *arguments: str) -> str | None:
    command = ["git", "--no-optional-locks", "-C", str(folder), *arguments]
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_LONGEST_GIT_S)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() if result.returncode == 0 else None
