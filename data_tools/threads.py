"""Work shared among threads. Hashing, numpy, Arrow and files all work without the interpreter's lock."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")
# Told, from any thread, how many bytes were done since the last call.
Advance = Callable[[int], None]


def available_cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def no_progress(done_bytes: int) -> None:
    """An ``Advance`` for those who do not want to know."""


def map_threads(
    work: Callable[[Item, Advance], Result], items: Sequence[Item], workers: int | None, advance: Advance
) -> list[Result]:
    """Results of ``work(item, advance)`` in the order of the items.

    Args:
        work: calls its ``advance`` every few megabytes; after a failure elsewhere that call ends it.
        items: taken up in order.
        workers: threads at most; None: one for each core.
        advance: is called by one thread at a time, first of all with 0.

    Raises:
        BaseException: that of the first item, in their order, that failed; those behind it are given up.
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
    """Ends a thread whose result nobody waits for."""
