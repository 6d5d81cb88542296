"""Describe the program and the machine at the start of a run."""

import hashlib
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

PROGRAM_ROOT = Path(__file__).resolve().parents[2]

_LONGEST_GIT_S = 10.0  # git can be slow in a large repository on a network disk


def describe_process() -> dict[str, Any]:
    """Describe this process: the time, the command, the host, the launcher, the packages, and the code.

    ``git`` is the commit of the working folder, which may contain the user's configs. ``program`` identifies the code
    of this program. The values of the keys ``launcher`` and ``git`` can be None.
    """
    return {
        "time": datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": shlex.join([Path(sys.executable).name, *sys.orig_argv[1:]]),
        "host": socket.gethostname(),
        "launcher": launcher_name(),
        "python": platform.python_version(),
        "packages": package_versions(),
        "git": describe_commit(Path.cwd()),
        "program": describe_program(PROGRAM_ROOT),
    }


def describe_program(root: Path) -> dict[str, Any]:
    """Return a hash of the source code below ``root``, and its git commit if git tracks the code.

    git does not track the code of an installed package, even if the package is inside of a repository.
    """
    own_file = str(Path(__file__).resolve().relative_to(PROGRAM_ROOT))
    is_tracked = _run_git(root, "ls-files", "--error-unmatch", own_file) is not None
    commit = describe_commit(root) if is_tracked else None
    return {"source_sha256": hash_source_code(root), **(commit or {})}


def hash_source_code(root: Path) -> str:
    """Return the SHA-256 of this program's source code. ``root`` contains ``data_tools`` and ``pipeline``."""
    digest = hashlib.sha256()
    for room in ("data_tools", "pipeline"):
        for path in sorted((root / room).rglob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()


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
