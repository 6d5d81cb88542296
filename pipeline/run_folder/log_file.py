"""Copy the log lines of a run into ``train.log`` in the run folder."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from data_tools.errors import UserError
from pipeline.errors import MainRankError
from pipeline.run_folder.layout import LOG_FILE

#: The packages whose log lines a user sees.
LOGGED_PACKAGES = ("pipeline", "data_tools", "launch")


class RunLog(logging.Handler):
    """Appends log lines to ``train.log``. Until ``open`` is called, the lines wait in memory.

    Lines that cannot be written, for example on a full disk, are lost.
    """

    def __init__(self, rank: int) -> None:
        super().__init__()
        prefix = f"[rank {rank}] " if rank else ""
        self.setFormatter(logging.Formatter(f"%(asctime)s %(levelname)-7s {prefix}%(message)s", "%Y-%m-%d %H:%M:%S"))
        self._waiting: list[str] = []
        self._path: Path | None = None

    def open(self, run_folder: Path) -> None:
        self._path = run_folder / LOG_FILE
        for line in self._waiting:
            self._append(line)
        self._waiting.clear()

    def emit(self, record: logging.LogRecord) -> None:
        line = self.format(record)
        if self._path is None:
            self._waiting.append(line)
        else:
            self._append(line)

    def _append(self, line: str) -> None:
        assert self._path is not None
        with suppress(OSError), self._path.open("ab") as file:
            file.write(f"{line}\n".encode(errors="backslashreplace"))


@contextmanager
def run_log(rank: int) -> Iterator[RunLog]:
    """Return a context manager whose ``with`` block gets a ``RunLog`` that receives all log lines of the block.

    An error in the block is also logged: a ``UserError`` as one line, any other error with its traceback.
    """
    handler = RunLog(rank)
    loggers = [logging.getLogger(name) for name in LOGGED_PACKAGES]
    for logger in loggers:
        logger.addHandler(handler)
    try:
        yield handler
    except MainRankError:
        raise  # the main rank logs this error
    except Exception as error:
        fields = {"levelname": "ERROR", "msg": "%s", "args": (error,)}
        trace = None if isinstance(error, UserError) else (type(error), error, error.__traceback__)
        handler.handle(logging.makeLogRecord({**fields, "exc_info": trace}))
        raise
    finally:
        for logger in loggers:
            logger.removeHandler(handler)
