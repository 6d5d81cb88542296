"""Process items in several threads. Hashing, numpy, Arrow and file access release the GIL."""

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from tqdm import tqdm

Item = TypeVar("Item")
Result = TypeVar("Result")
Advance = Callable[[int], None]  # called from any thread with the bytes that were processed since the previous call


def available_cores() -> int:
    """Return the number of processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def lock_bars_among_threads() -> None:
    """Replace the lock of tqdm's progress bars by a lock that works only among the threads of this process.

    The lock that tqdm creates is a semaphore of the operating system. Python reports this semaphore as leaked if a
    process ends without shutting down the interpreter. Workers and ranks often end like this.
    """
    tqdm.set_lock(threading.RLock())


def no_progress(done_bytes: int) -> None:
    """Ignore the progress. This function can be used as an ``Advance``."""


def map_threads(
    work: Callable[[Item, Advance], Result], items: Sequence[Item], workers: int | None, advance: Advance
) -> list[Result]:
    """Return the results of ``work(item, advance)`` in the order of the items.

    Args:
        work: a function that calls its argument ``advance`` every few megabytes. If another item has failed, this call
            of ``advance`` raises an error, which ends the work.
        items: the items. Work on them starts in their order.
        workers: the maximum number of threads. None means one thread per core.
        advance: a function that receives the number of bytes since its last call. It is called once with 0 before the
            work starts, and never by two threads at the same time.

    Raises:
        BaseException: the exception of the first item that failed. Later items are abandoned.
    """
    advance(0)
    abandoned = threading.Event()
    lock = threading.Lock()

    def advance_or_end(done_bytes: int) -> None:
        if abandoned.is_set():
            raise _AbandonedError
        with lock:
            advance(done_bytes)

    with ThreadPoolExecutor(workers or available_cores()) as pool:
        futures = [pool.submit(work, item, advance_or_end) for item in items]
        try:
            return [future.result() for future in futures]
        except BaseException:
            abandoned.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise


class _AbandonedError(Exception):
    """Ends the work on an abandoned item."""
