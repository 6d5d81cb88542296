"""Apply one function to many items in worker processes, and replace workers that die."""

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

Item = TypeVar("Item")
Result = TypeVar("Result")
#: ``work(item, report)``. The arguments of ``report`` are passed on to the caller's ``on_report``.
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
    """Yield ``work(item, report)`` for each item, in the order in which they finish.

    One worker is this process. With more, ``work``, items and results must be picklable, and a script that calls this
    needs ``if __name__ == "__main__"``. Closing the generator kills the workers.

    Args:
        on_report: called in this process with what workers report.
        preload: modules that are imported once for all workers.

    Raises:
        DataError: workers died repeatedly at the same item, or cannot be started.
    """
    if workers == 1:
        for item in items:
            yield work(item, on_report)
        return
    pool = _Pool(work, deque(items), workers, _context(preload))
    try:
        yield from pool.results(on_report)
    finally:
        pool.kill()


def _context(preload: tuple[str, ...]) -> BaseContext:
    # fork would copy locks that threads of this process (pyarrow, datasets) may hold.
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["__main__", *preload])
    return context


class _Worker(Generic[Item, Result]):
    """A process, the pipe to it, and the item that it works on."""

    def __init__(self, work: Work[Item, Result], context: Any) -> None:
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(work, theirs), daemon=True)
        try:
            self.process.start()
        except OSError as error:
            raise DataError(
                f"cannot start a worker process: {error} (memory short, or the path of TMPDIR too long: "
                f"{tempfile.gettempdir()}?); --workers 1 needs none"
            ) from error
        theirs.close()
        self.item: Item | None = None

    def begin(self, item: Item) -> None:
        self.item = item
        with suppress(OSError):  # it has just died, which the next read from its pipe notices
            self.connection.send(item)


class _Pool(Generic[Item, Result]):
    """The workers and the items that wait for one."""

    def __init__(self, work: Work[Item, Result], items: deque[Item], workers: int, context: BaseContext) -> None:
        self._work = work
        self._items = items
        self._context = context
        self._deaths: list[Item] = []
        self._workers = [_Worker(work, context) for _ in range(min(workers, len(items)))]

    def results(self, on_report: Callable[..., None]) -> Generator[Result, None, None]:
        for worker in self._workers:
            worker.begin(self._items.popleft())
        while busy := {worker.connection: worker for worker in self._workers if worker.item is not None}:
            for connection in wait(list(busy)):
                worker = busy[connection]
                try:
                    kind, value = worker.connection.recv()
                except (EOFError, OSError):  # OSError: it died while sending
                    self._replace(worker)
                    continue
                if kind == _REPORT:
                    on_report(*value)
                    continue
                worker.item = None
                if kind == _ERROR:
                    raise value
                if self._items:
                    worker.begin(self._items.popleft())
                yield value

    def kill(self) -> None:
        for worker in self._workers:
            worker.process.kill()
            worker.connection.close()
        for worker in self._workers:
            worker.process.join()

    def _replace(self, dead: _Worker[Item, Result]) -> None:
        """Start a new process for the item at which a worker died."""
        item = dead.item
        assert item is not None
        dead.process.join()
        dead.connection.close()
        self._deaths.append(item)
        if self._deaths.count(item) == _ATTEMPTS:
            raise DataError(
                f"the worker process died {_ATTEMPTS} times at {item} (killed, or out of memory?); "
                "repeat the command to continue, with fewer --workers if memory is short"
            )
        self._workers.remove(dead)
        worker = _Worker(self._work, self._context)
        self._workers.append(worker)
        worker.begin(item)


def _serve(work: Work[Any, Any], connection: Connection) -> None:
    """Work on the items that the pipe delivers until it is closed."""
    # Ctrl-C reaches the whole process group, but the parent decides how to end.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    while True:
        try:
            item = connection.recv()
        except EOFError:
            return
        try:
            result = work(item, lambda *values: connection.send((_REPORT, values)))
        except Exception as error:  # noqa: BLE001 (the parent raises it)
            connection.send((_ERROR, _picklable(error)))
        else:
            connection.send((_RESULT, result))


def _picklable(error: Exception) -> Exception:
    if isinstance(error, (DataError, OSError)):
        return error
    return RuntimeError("in a worker process:\n" + "".join(traceback.format_exception(error)))


def _exit_with_parent() -> None:
    """End this process when its parent is killed: a worker that is busy does not read its pipe."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
