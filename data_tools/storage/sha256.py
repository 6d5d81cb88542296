"""Compute the SHA-256 of files, in this process or in a second one.

The second process runs this file as a program. Therefore, this file imports only the standard library.
"""

import hashlib
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import repeat
from pathlib import Path

_READ_BYTES = 8 << 20  # large, because each read releases and acquires the GIL twice


def sha256_of_file(path: Path, advance: Callable[[int], None] = lambda done_bytes: None) -> str:
    """Return the SHA-256 of a file as 64 hexadecimal digits. The file is read in constant memory.

    ``advance`` receives the number of bytes read since its last call, every few megabytes.
    """
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(_READ_BYTES))
    with open(path, "rb", buffering=0) as file:
        while n := file.readinto(buffer):
            digest.update(buffer[:n])
            advance(n)
    return digest.hexdigest()


def start_hashing(paths: Sequence[Path], threads: int) -> subprocess.Popen[str]:
    """Start a process that prints the SHA-256 of each file, one per line. Raises OSError if it cannot be started.

    The process prints no error. It ends at the first file that it cannot read.

    Args:
        threads: how many files to hash at the same time.
    """
    return subprocess.Popen(
        [sys.executable, "-I", __file__, str(threads), *map(str, paths)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )


def _print_hashes(threads: int, paths: Sequence[Path]) -> None:
    """Print the SHA-256 of each file. End if the process that needs the hashes dies.

    The lower priority leaves a whole core to the other process as long as it does not wait.
    """
    parent = os.getppid()
    os.nice(3)

    def end_without_parent(done_bytes: int) -> None:
        if os.getppid() != parent:
            sys.exit("the process that needs the hashes has ended")

    with ThreadPoolExecutor(threads) as pool:
        for sha256 in pool.map(sha256_of_file, paths, repeat(end_without_parent)):
            print(sha256, flush=True)


if __name__ == "__main__":
    _print_hashes(int(sys.argv[1]), [Path(path) for path in sys.argv[2:]])
