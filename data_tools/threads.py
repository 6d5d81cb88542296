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

    Many functions have an argument ``advance``, to which they report their progress. If nobody needs the reports, pass
    this function.
    """


def map_threads(
    work: Callable[[Item, Advance], Result], items: Sequence[Item], workers: int | None, advance: Advance
) -> list[Result]:
    """Call ``work(item, report)`` for each item in several threads. Return the results in the order of the items.

    Args:
        work: a function that processes an item and returns the result. Its second argument is a function ``report``.
            Every few megabytes, ``work`` must call ``report`` with the number of bytes that it has processed since the
            previous report. If another item has failed, ``report`` raises an error, so that ``work`` ends early.
        items: the items. They are started in the order of this sequence.
        workers: the largest number of threads. None means one per core.
        advance: a function that receives each reported number of bytes. The first call, with 0, is made before the
            work begins. Two threads never call ``advance`` at the same time.

    Raises:
        BaseException: the exception of an item that failed. If several items failed, the exception of the first of them
            in ``items``. Unfinished items are abandoned.
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
