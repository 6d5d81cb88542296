"""Call a function for many items in worker processes. Workers that die are replaced."""

from __future__ import annotations

import multiprocessing
import os
import signal
import tempfile
import threading
import traceback
from collections import deque
from collections.abc import Callable, Generator, Iterable
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from multiprocessing.context import BaseContext
from typing import Any, Generic, TypeVar

from data_tools.errors import DataError
from data_tools.threads import lock_bars_among_threads

Item = TypeVar("Item")
Result = TypeVar("Result")
#: ``work(item, report)``. When ``work`` calls ``report``, the caller's ``on_report`` receives the arguments.
Work = Callable[[Item, Callable[..., None]], Result]

_ATTEMPTS = 3
_REPORT, _RESULT, _ERROR = "report", "result", "error"


def unordered_map(
    work: Work[Item, Result],
    items: Iterable[Item],
    workers: int,
    on_report: Callable[..., None],
    preload: tuple[str, ...] = (),
) -> Generator[Result, None, None]:
    """Call ``work(item, report)`` for each item in worker processes. Yield each result as soon as it is available.

    If ``workers`` is 1, this process does the work. Otherwise, ``work``, the items and the results must be picklable,
    and the script that calls this function needs ``if __name__ == "__main__"``. If the caller closes the generator, the
    workers are killed.

    Args:
        workers: the number of worker processes.
        on_report: a function for progress reports. It is called in this process whenever ``work`` calls ``report`` in a
            worker, with the arguments of that call.
        preload: the names of modules to import once for all workers.

    Raises:
        DataError: several worker processes died while they processed the same item, or a worker cannot be started.
    """
    if workers == 1:
        for item in items:
            yield work(item, on_report)
        return
    waiting = deque(items)
    deaths: list[Item | None] = []
    context = _context(preload)
    pool: list[_Worker[Item, Result]] = []
    try:
        for _ in range(min(workers, len(waiting))):
            pool.append(_Worker(work, context))
            pool[-1].begin(waiting.popleft())
        while busy := {worker.connection: worker for worker in pool if worker.item is not None}:
            for connection in wait(list(busy)):
                worker = busy[connection]
                try:
                    kind, value = worker.connection.recv()
                except (EOFError, OSError):  # OSError: the worker died while it was sending
                    deaths.append(worker.item)
                    if deaths.count(worker.item) == _ATTEMPTS:
                        raise DataError(
                            f"the worker process died {_ATTEMPTS} times at {worker.item} (killed, or out of memory?); "
                            "repeat the command to continue, with fewer --workers if memory is short"
                        ) from None
                    worker.restart()
                    continue
                if kind == _REPORT:
                    on_report(*value)
                    continue
                worker.item = None
                if kind == _ERROR:
                    raise value
                if waiting:
                    worker.begin(waiting.popleft())
                yield value
    finally:
        for worker in pool:
            worker.process.kill()
            worker.connection.close()
        for worker in pool:
            worker.process.join()


def _context(preload: tuple[str, ...]) -> BaseContext:
    # A forked process would inherit locks that other threads of this process (from pyarrow, datasets) may hold.
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["__main__", *preload])
    return context


class _Worker(Generic[Item, Result]):
    """A worker process, the pipe to the process, and the item that the process works on."""

    def __init__(self, work: Work[Item, Result], context: Any) -> None:
        self._work = work
        self._context = context
        self.item: Item | None = None
        self._start()

    def begin(self, item: Item) -> None:
        self.item = item
        with suppress(OSError):  # the worker has just died; the next read from its pipe detects this
            self.connection.send(item)

    def restart(self) -> None:
        """Start a new process, and give it the item that the dead process worked on."""
        assert self.item is not None
        self.process.join()
        self.connection.close()
        self._start()
        self.begin(self.item)

    def _start(self) -> None:
        connection, theirs = self._context.Pipe()
        process = self._context.Process(target=_serve, args=(self._work, theirs), daemon=True)
        try:
            process.start()
        except OSError as error:
            raise DataError(
                f"cannot start a worker process: {error} (memory short, or the path of TMPDIR too long: "
                f"{tempfile.gettempdir()}?); --workers 1 needs none"
            ) from error
        theirs.close()
        self.connection, self.process = connection, process


def _serve(work: Work[Any, Any], connection: Connection) -> None:
    """Read items from the pipe and work on each item, until the pipe is closed."""
    # Ctrl-C sends SIGINT to the whole process group. The parent handles the signal and then kills its workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    lock_bars_among_threads()
    while True:
        try:
            item = connection.recv()
        except EOFError:
            return
        try:
            result = work(item, lambda *values: connection.send((_REPORT, values)))
        except (DataError, OSError) as error:
            connection.send((_ERROR, error))
        except Exception as error:  # noqa: BLE001 (some errors cannot be pickled, but a RuntimeError can)
            traceback_text = "".join(traceback.format_exception(error))
            connection.send((_ERROR, RuntimeError(f"in a worker process:\n{traceback_text}")))
        else:
            connection.send((_RESULT, result))


def _exit_with_parent() -> None:
    """End this process if its parent dies. A busy worker reads from its pipe too late to notice this."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
