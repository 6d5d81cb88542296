"""Process items in several threads. This is useful because hashing, numpy, Arrow and file access release the GIL."""

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
    """Return the number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def lock_bars_among_threads() -> None:
    """Make tqdm's progress bars use a lock that works only for threads, and not for several processes.

    By default, tqdm creates a semaphore of the operating system. If a process ends without shutting down the
    interpreter, as workers and ranks often do, Python prints a warning about this semaphore.
    """
    tqdm.set_lock(threading.RLock())


def no_progress(done_bytes: int) -> None:
    """Do nothing.

    Pass this function as ``advance`` to a function that reports its progress, if nobody needs the reports.
    """


def map_threads(
    work: Callable[[Item, Advance], Result], items: Sequence[Item], workers: int | None, advance: Advance
) -> list[Result]:
    """Call ``work(item, advance)`` for each item in several threads. Return the results in the order of the items.

    Args:
        work: a function. It must call its argument ``advance`` every few megabytes, with the number of bytes that it
            has processed since the last such call. If the work on another item has failed, ``advance`` raises an error,
            which ends this call of ``work``.
        items: the items. They are started in this order.
        workers: the largest number of threads. None means one per core.
        advance: a function that is called with the number of bytes that all threads have processed since its last call.
            In the first call, this number is 0. Two threads never call the function at the same time.

    Raises:
        BaseException: an item failed. If several items failed, this is the exception of the one that comes first in
            ``items``. Items that are not finished are abandoned.
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
