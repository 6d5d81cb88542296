"""Process items in several threads.

The threads run in parallel while they hash, read files, or call numpy or Arrow, because these calls release the GIL.
"""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from data_tools.limits import available_cores

Item = TypeVar("Item")
Result = TypeVar("Result")
Advance = Callable[[int], None]  # called from any thread with the bytes that were processed since the previous call


def lock_bars_among_threads() -> None:
    """Make tqdm's progress bars use a lock that works between threads but not between processes.

    tqdm's default lock includes a semaphore for several processes. If a process ends abruptly, Python prints a warning
    about this semaphore.
    """
    from tqdm import tqdm  # here, because the import is slow

    tqdm.set_lock(threading.RLock())


def no_progress(done_bytes: int) -> None:
    """Ignore a progress report. Pass this function if you need no reports."""


def map_threads(
    work: Callable[[Item, Advance], Result], items: Sequence[Item], workers: int | None, advance: Advance
) -> list[Result]:
    """Call ``work(item, report)`` for each item in several threads. Return the results in the order of the items.

    ``work`` must call ``report`` every few megabytes with the number of bytes processed since the last call. When
    another item has failed, ``report`` raises an error, which ends ``work`` early.

    Args:
        workers: the largest number of threads. None means one per core.
        advance: receives 0 at the start, and then each reported number. Calls of ``advance`` never overlap.

    Raises:
        BaseException: the error of the first item in ``items`` that failed. Unfinished items are abandoned.
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
