"""Access files at URLs with fsspec.

The functions import fsspec, because this takes a tenth of a second and local files do not need it.
"""

import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from contextlib import AbstractContextManager
from typing import Any, TypeVar

from data_tools.errors import DataError, install_command, one_line

Result = TypeVar("Result")

#: A request for the names or sizes of files is announced after this time, and ends after ``_LONGEST_WAIT_S`` seconds.
_ANNOUNCE_AFTER_S = 10.0
_LONGEST_WAIT_S = 120.0

#: The methods of fsspec that delete files. Each kind of URL that can be written defines at least one of them.
_DELETING = ("rm", "_rm", "rm_file", "_rm_file")
_PROTOCOLS_OF_THE_EXTRA = ("s3", "s3a", "gs", "gcs")
_WRITABLE_URLS = "name a URL such as s3://bucket/folder, gs://bucket/folder or file:///folder"

log = logging.getLogger(__name__)


def find_file_system(url: str, **options: Any) -> tuple[Any, str]:
    """Return fsspec's file system for a URL, and the path in this file system. ``options`` are fsspec's options."""
    import fsspec

    file_system, path = fsspec.core.url_to_fs(url, **options)
    return file_system, path


def require_writable_url(url: str, option: str) -> None:
    """Raise DataError if files at a URL cannot be written and deleted with the installed packages.

    Call this function before slow work. It asks no server, so it notices no missing rights.

    ``option`` is the option or the key that contains the URL. The message begins with ``option``.
    """
    import fsspec
    from fsspec.asyn import AsyncFileSystem

    protocol = url.partition("://")[0].partition("::")[0]
    try:
        file_system = fsspec.get_filesystem_class(protocol)
    except ValueError:
        raise DataError(f"{option}: {url}: no kind of URL begins with {protocol}://; {_WRITABLE_URLS}") from None
    except ImportError as error:
        extra = f": {install_command('remote')}" if protocol in _PROTOCOLS_OF_THE_EXTRA else ""
        raise DataError(f"{option}: {url}: needs a package that is missing ({one_line(error)}){extra}") from error
    # The classes of fsspec have all methods, but those that each kind of URL must define do nothing or raise errors.
    own = [base for base in file_system.__mro__ if base not in (fsspec.AbstractFileSystem, AsyncFileSystem)]
    if not any(method in vars(base) for base in own for method in _DELETING):
        raise DataError(f"{option}: {url}: files at {protocol}:// can only be read; {_WRITABLE_URLS}")


def find_folder(url: str, **options: Any) -> Any:
    """Return a file system of fsspec whose paths are relative to the folder at a URL."""
    from fsspec.implementations.dirfs import DirFileSystem

    file_system, path = find_file_system(url, **options)
    return DirFileSystem(path, file_system)


def open_url(url: str) -> AbstractContextManager[Any]:
    """Return a context manager that opens the file at a URL for reading bytes."""
    import fsspec

    opened: AbstractContextManager[Any] = fsspec.open(url, "rb")
    return opened


def wait_for_answer(url: str, request: Callable[[], Result]) -> Result:
    """Return the result of a short request to the server of a URL, and say if the server is slow to answer.

    The clients repeat a request for minutes if a server accepts connections and never answers.

    Raises:
        DataError: the request has taken longer than ``_LONGEST_WAIT_S``. Its thread continues until the process ends.
    """
    future: Future[Result] = Future()

    def call() -> None:
        try:
            future.set_result(request())
        except BaseException as error:  # noqa: BLE001 - raised in the thread that waits
            future.set_exception(error)

    threading.Thread(target=call, name="remote request", daemon=True).start()
    if wait([future], _ANNOUNCE_AFTER_S).not_done:
        log.warning("still waiting for an answer from the server of %s, at most %.0f s", url, _LONGEST_WAIT_S)
    if wait([future], _LONGEST_WAIT_S - _ANNOUNCE_AFTER_S).not_done:
        raise DataError(
            f"{url}: no answer from the server in {_LONGEST_WAIT_S:.0f} s; check its address and the network"
        )
    return future.result()
