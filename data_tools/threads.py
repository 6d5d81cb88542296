"""Work on several threads: hashing, numpy, Arrow and file access release the GIL."""

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")
Advance = Callable[[int], None]  # called from any thread with the bytes done since its last call


def available_cores() -> int:
    """Return the number of processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def no_progress(done_bytes: int) -> None:
    """Ignore progress; an ``Advance``."""


def map_threads(
    work: Callable[[Item, Advance], Result], items: Sequence[Item], workers: int | None, advance: Advance
) -> list[Result]:
    """Return the results of ``work(item, advance)`` in the order of the items.

    Args:
        work: calls its ``advance`` every few megabytes; after another item failed, that call raises and ends the work.
        items: started in order.
        workers: the largest number of threads; None means one per core.
        advance: called by one thread at a time, first with 0.

    Raises:
        BaseException: the exception of the first item that failed; later items are abandoned.
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
