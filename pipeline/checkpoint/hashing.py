"""Hash the checkpoint from which a run will probably start, while this process imports packages.

A second process computes the hashes, because a thread would wait for the GIL after each chunk. This module does not
import torch.
"""

import subprocess
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from data_tools.limits import available_cores
from data_tools.storage.sha256 import sha256_of_file, start_hashing
from pipeline.checkpoint.layout import is_checkpoint, list_checkpoints, parse_tensor_file
from pipeline.distributed.environment import launched_rank

#: A function that returns the SHA-256 of a file.
HashFile = Callable[[Path], str]
_MOST_THREADS = 8


def find_likely_start(run_folder: Path, resume: str) -> list[Path]:
    """Return the tensor files of the checkpoint that a run will probably verify first. Nothing is verified here.

    The list is empty for a new run, and on all ranks but rank 0, because only rank 0 verifies the checkpoint.

    Args:
        resume: the value of ``checkpoint.resume``.
    """
    if launched_rank():
        return []
    named = Path(resume)
    try:
        checkpoints = list_checkpoints(run_folder) or ([named] if is_checkpoint(named) else list_checkpoints(named))
        files = checkpoints[-1].iterdir() if checkpoints else ()
        return sorted(path for path in files if parse_tensor_file(path.name) and path.is_file())
    except OSError:
        return []  # the run reports the error when it looks for a checkpoint


@contextmanager
def hashing_in_background(paths: Sequence[Path]) -> Iterator[HashFile]:
    """Return a context manager that hashes files in a second process. Its block gets a function that hashes any file.

    For one of ``paths``, this function waits for the second process. It hashes all other files itself, and also a file
    that has changed since the block began. The second process does not outlive the block.
    """
    hashes = _BackgroundHashes(paths)
    try:
        yield hashes.hash_file
    finally:
        hashes.close()


class _BackgroundHashes:
    """The SHA-256 of files that a second process hashes."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = paths
        self._identities: dict[Path, tuple[int, ...]] = {}
        self._process: subprocess.Popen[str] | None = None
        self._lock = threading.Lock()
        self._found: dict[Path, str] = {}
        with suppress(OSError):  # hash_file will hash the files itself
            self._identities = {path: _identify(path) for path in paths}
            self._process = start_hashing(paths, min(_MOST_THREADS, available_cores())) if paths else None

    def hash_file(self, path: Path) -> str:
        """Return the SHA-256 of a file. Several threads may call this method."""
        with self._lock:
            if self._process is not None:
                output, _ = self._process.communicate()
                self._found = dict(zip(self._paths, output.split(), strict=False))  # fewer hashes after an error
                self._process = None
        if path in self._found and self._identities[path] == _identify(path):
            return self._found[path]
        return sha256_of_file(path)

    def close(self) -> None:
        """Stop the second process."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()


def _identify(path: Path) -> tuple[int, ...]:
    """Return numbers that change if a file is written or replaced."""
    status = path.stat()
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns
