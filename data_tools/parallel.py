"""One function over many items in worker processes: results in order, memory bounded."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from data_tools.errors import DataError

Item = TypeVar("Item")
Result = TypeVar("Result")

# Enough to keep every worker busy while the results of the oldest item are consumed.
_ITEMS_AHEAD_PER_WORKER = 3


def ordered_map(
    function: Callable[[Item], Result], items: Iterable[Item], workers: int
) -> Generator[Result, None, None]:
    """Yield ``function(item)`` for each item, in the order of the items.

    With one worker everything happens in this process. With more, ``function``, items and results must be
    picklable, and a script that calls this needs the usual ``if __name__ == "__main__"``. Items are taken
    only a few ahead of what was yielded. Closing the generator stops the workers.

    Raises:
        DataError: a worker process died.
    """
    if workers == 1:
        yield from map(function, items)
        return
    pool = ProcessPoolExecutor(
        max_workers=workers,
        # fork would copy the locks that threads of this process (pyarrow, datasets) may hold.
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_prepare_worker,
    )
    pending: deque[Future[Result]] = deque()
    try:
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) > workers * _ITEMS_AHEAD_PER_WORKER:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool as error:
        raise DataError(
            f"one of the {workers} worker processes died (killed, or out of memory?); "
            "repeat the command to continue, with fewer --workers if memory is short"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _prepare_worker() -> None:
    # Ctrl-C reaches the whole process group; the parent alone decides how to end.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    """A worker holds both ends of its queue, so nothing else tells it that its parent was killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
