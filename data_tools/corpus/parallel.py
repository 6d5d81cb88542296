"""Call a function for many items in worker processes. Workers that die are replaced.

While a worker processes an item, a second thread of the worker can write the result of the previous item to files.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import tempfile
import threading
import traceback
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import forkserver, resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.context import BaseContext
from typing import Any, Generic, TypeVar

from data_tools.errors import DataError
from data_tools.limits import MemoryKills
from data_tools.threads import lock_bars_among_threads

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Unfinished(Generic[Result]):
    """The result of a ``Work`` function whose files are not written yet. A thread calls ``finish`` to write them."""

    finish: Callable[[], Result]


#: ``work(item, report)``, the function that a worker calls for an item.
Work = Callable[[Item, Callable[..., None]], Result | Unfinished[Result]]

_ATTEMPTS = 3
_REPORT, _READY, _RESULT, _ERROR, _DEATH = "report", "ready", "result", "error", "death"


def unordered_map(
    work: Work[Item, Result],
    items: Iterable[Item],
    workers: int,
    on_report: Callable[..., None],
    preload: tuple[str, ...] = (),
) -> Generator[Result, None, None]:
    """Call ``work(item, report)`` for each item in worker processes. Yield each result as soon as it is available.

    If ``workers`` is 1, this process does the work. Otherwise, ``work``, the items and the results must be picklable,
    and the calling script needs ``if __name__ == "__main__"``. Closing the generator kills the workers.

    Args:
        on_report: receives the arguments of each call of ``report``, in this process.
        preload: modules that are imported once for all workers, on systems with the start method ``forkserver``.

    Raises:
        DataError: several workers died at the same item, or a worker cannot be started.
    """
    if workers == 1:
        yield from _map_in_this_process(work, items, on_report)
        return
    pool = _Pool(work, items)
    try:
        start_server(preload)
        pool.start(workers, _context(preload))
        yield from pool.results(on_report)
    finally:
        pool.close()


def _map_in_this_process(
    work: Work[Item, Result], items: Iterable[Item], on_report: Callable[..., None]
) -> Generator[Result, None, None]:
    with ThreadPoolExecutor(1) as thread:
        finishing: Future[Result] | None = None
        for item in items:
            outcome = work(item, on_report)
            if finishing is not None:
                yield finishing.result()
            finishing = thread.submit(finished, outcome)
        if finishing is not None:
            yield finishing.result()


def finished(outcome: Result | Unfinished[Result]) -> Result:
    """Return ``outcome.finish()`` if ``outcome`` is ``Unfinished``, otherwise ``outcome``."""
    return outcome.finish() if isinstance(outcome, Unfinished) else outcome


def start_server(preload: tuple[str, ...]) -> None:
    """Start the process from which ``unordered_map`` forks its workers. Return at once."""
    if "forkserver" in multiprocessing.get_all_start_methods():
        _context(preload)
        # The start of the first worker raises the same OSError, with an explanation.
        with suppress(OSError), _interrupts_blocked():
            forkserver.ensure_running()


@contextmanager
def _interrupts_blocked() -> Iterator[None]:
    """Block Ctrl-C in this thread, so that the processes that the block starts do not receive it.

    Otherwise, Ctrl-C would interrupt their imports, and they would print tracebacks.
    """
    resource_tracker.ensure_running()  # it unblocks SIGINT when it starts
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _context(preload: tuple[str, ...]) -> BaseContext:
    # A process forked from this one would inherit locks that other threads (pyarrow, datasets) may hold.
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["__main__", *preload])
    return context


class _Pool(Generic[Item, Result]):
    """The worker processes, and the items that wait for a worker.

    If a process dies while it has two items, one of the two items is the reason. Both items are then repeated, each in
    a process without other items, so that the error message names the right item.
    """

    def __init__(self, work: Work[Item, Result], items: Iterable[Item]) -> None:
        self._work = work
        self._waiting = deque(items)
        self._suspects: list[Item] = []  # no worker gets one of these items together with another item
        self._deaths: list[Item] = []  # the items at which a process died
        self._memory_kills = MemoryKills()
        self._workers: list[_Worker[Item, Result]] = []

    def start(self, workers: int, context: BaseContext) -> None:
        """Start the workers, each with its first item."""
        for _ in range(min(workers, len(self._waiting))):
            self._workers.append(_Worker(self._work, context))
            self._workers[-1].begin(self._waiting.popleft())

    def results(self, on_report: Callable[..., None]) -> Generator[Result, None, None]:
        """Yield each result as soon as it is available. ``on_report`` receives the reports of the workers."""
        while busy := {worker.connection: worker for worker in self._workers if worker.items}:
            for connection in wait(list(busy)):
                worker = busy[connection]
                try:
                    kind, value = worker.connection.recv()
                except (EOFError, OSError):  # OSError: the worker died while it was sending
                    kind, value = _DEATH, None
                if kind == _DEATH:
                    self._replace(worker)
                elif kind == _REPORT:
                    on_report(*value)
                elif kind == _ERROR:
                    raise value
                elif kind == _RESULT:
                    worker.items.popleft()
                    self._feed(worker)
                    yield value
                else:
                    worker.is_ready = True
                    self._feed(worker)

    def close(self) -> None:
        """Kill all workers."""
        for worker in self._workers:
            worker.process.kill()
            worker.connection.close()
        for worker in self._workers:
            worker.process.join()

    def _feed(self, worker: _Worker[Item, Result]) -> None:
        """Give the next item to a worker, if an item is left and the worker can begin it."""
        if not (self._waiting and worker.is_ready):
            return
        if not worker.items or not any(item in self._suspects for item in (worker.items[0], self._waiting[0])):
            worker.begin(self._waiting.popleft())

    def _replace(self, worker: _Worker[Item, Result]) -> None:
        """Start a new process for a worker that has died. Raise DataError if an item has killed several processes."""
        if len(worker.items) > 1:
            self._suspects += worker.items
        else:
            self._deaths += worker.items
            if self._deaths.count(worker.items[0]) == _ATTEMPTS:
                cause = self._memory_kills.describe() or "it may have been killed, or memory may be short"
                raise DataError(
                    f"the worker process died {_ATTEMPTS} times at {worker.items[0]}: {cause}; repeat the command to "
                    "continue, with fewer --workers or smaller files if memory is short"
                )
        self._waiting.extendleft(reversed(worker.restart()))


class _Worker(Generic[Item, Result]):
    """A worker process, its pipe, and one or two items.

    The process works on the last item. With two items, it also writes the result of the first item.
    """

    def __init__(self, work: Work[Item, Result], context: Any) -> None:
        self._work = work
        self._context = context
        self.items: deque[Item] = deque()
        self.is_ready = False  # whether the process can begin another item
        self._start()

    def begin(self, item: Item) -> None:
        self.items.append(item)
        self.is_ready = False
        with suppress(OSError):  # the worker has just died; the next read from its pipe detects this
            self.connection.send(item)

    def restart(self) -> list[Item]:
        """Start a new process with the oldest item of the dead process. Return the other items."""
        oldest, *others = self.items
        self.items.clear()
        self.process.join()
        self.connection.close()
        self._start()
        self.begin(oldest)
        return others

    def _start(self) -> None:
        connection, theirs = self._context.Pipe()
        process = self._context.Process(target=_serve, args=(self._work, theirs), daemon=True)
        try:
            process.start()
        except (OSError, EOFError) as error:  # EOFError: the process that forks workers has died
            raise DataError(
                f"cannot start a worker process: {error} (memory short, or the path of TMPDIR too long: "
                f"{tempfile.gettempdir()}?); --workers 1 needs none"
            ) from error
        theirs.close()
        self.connection, self.process = connection, process


def _serve(work: Work[Item, Result], connection: Connection) -> None:
    # Ctrl-C sends SIGINT to the whole process group. The parent handles the signal and then kills its workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    lock_bars_among_threads()
    lock = threading.Lock()

    def send(kind: str, value: Any = None) -> None:
        with lock:
            connection.send((kind, value))

    def finish(outcome: Result | Unfinished[Result]) -> None:
        with _errors_to_parent(send):
            send(_RESULT, finished(outcome))

    with ThreadPoolExecutor(1) as thread:
        finishing: Future[None] | None = None
        while True:
            try:
                item = connection.recv()
            except EOFError:
                return
            with _errors_to_parent(send):
                outcome = work(item, lambda *values: send(_REPORT, values))
                if finishing is not None:
                    finishing.result()  # wait, so that at most one result is waiting for the disk
                send(_READY)
                finishing = thread.submit(finish, outcome)


@contextmanager
def _errors_to_parent(send: Callable[[str, Any], None]) -> Iterator[None]:
    """Send errors of the ``with`` block to the parent process. The parent process raises them."""
    try:
        yield
    except (DataError, OSError) as error:
        send(_ERROR, error)
    except Exception as error:  # noqa: BLE001 (some errors cannot be pickled, but a RuntimeError can)
        traceback_text = "".join(traceback.format_exception(error))
        send(_ERROR, RuntimeError(f"in a worker process:\n{traceback_text}"))


def _exit_with_parent() -> None:
    """End this process when its parent dies. Without this function, a busy worker would notice the death too late."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
