"""Connect the ranks of a run with each other. This also works after the launcher has restarted the ranks."""

import errno
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

from torch._C._distributed_c10d import HashStore, PrefixStore, Store, TCPStore
from torch.distributed import DistNetworkError

from pipeline.distributed.environment import launcher_holds_store, master_address, unset_command
from pipeline.errors import ConfigError

_POLL_S = 0.02
_ANNOUNCE_AFTER_S = 8.0


def open_store(rank: int, size: int, timeout: timedelta) -> Store:
    """Return an empty key-value store that all ranks share.

    torchrun keeps its store when it restarts the ranks. If the new ranks found the addresses of the earlier ranks in
    it, they would wait forever. Therefore, the keys get a new prefix at each start. If there is only one rank, the
    store is in memory and needs no port.

    Raises:
        TimeoutError: a rank has not connected within ``timeout``.
        ConfigError: another process uses the port of the store.
    """
    if size == 1:
        return HashStore()
    missing = set(range(1, size)) if rank == 0 else {0}
    with _announced(lambda: _describe_wait(rank, size, missing)):
        store = connect(rank, size, timeout)
        deadline = time.monotonic() + timeout.total_seconds()
        if rank == 0:
            start_id = _publish_start_id(store, missing, deadline)
        else:
            start_id = _request_start_id(store, rank, deadline)
    return PrefixStore(start_id, store)


def connect(rank: int, size: int, timeout: timedelta) -> Store:
    """Connect to the key-value store at the launcher's address. If the launcher does not serve it, rank 0 does."""
    host, port = master_address()
    is_server = rank == 0 and not launcher_holds_store()
    try:
        return TCPStore(host, port, size, is_server, timeout, wait_for_workers=False)
    except DistNetworkError as error:
        if is_server and (os.strerror(errno.EADDRINUSE) in str(error) or "EADDRINUSE" in str(error)):
            raise ConfigError(
                f"port {port} of {host} (MASTER_PORT) is in use by another process, perhaps another run; choose a free "
                f"one: deepspeed --master_port {free_port()} ..., or torchrun --standalone ..."
            ) from None
        raise


def free_port() -> int:
    """Return a port of this host on which no process is listening now."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def _announced(describe: Callable[[], str]) -> Iterator[None]:
    """Print once what the block waits for, if the block takes longer than ``_ANNOUNCE_AFTER_S``."""
    timer = threading.Timer(_ANNOUNCE_AFTER_S, lambda: print(describe(), file=sys.stderr, flush=True))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _describe_wait(rank: int, size: int, missing: set[int]) -> str:
    host, port = master_address()
    numbers = [str(number) for number in sorted(missing)]
    listed = ", ".join(numbers[:8]) + (f" and {len(numbers) - 8} more" if len(numbers) > 8 else "")
    return (
        f"rank {rank} on {socket.gethostname()} still waits at {host}:{port} (MASTER_ADDR, MASTER_PORT) for rank"
        f"{'s' if len(numbers) > 1 else ''} {listed} of {size} (WORLD_SIZE); if these variables are left over from "
        f"another launcher: {unset_command()}"
    )


def _publish_start_id(store: Store, waiting: set[int], deadline: float) -> str:
    """Choose an id for this start, send it to every rank that asks, and return it when all ranks have confirmed it.

    Each request has its own id, so that a rank recognizes an answer to a request of an earlier start.
    """
    start_id = uuid.uuid4().hex
    answered: dict[int, str] = {}
    while waiting:
        for rank in list(waiting):
            request = _get(store, f"request_{rank}")
            if request and answered.get(rank) != request:
                store.set(f"answer_{rank}", f"{request} {start_id}")
                answered[rank] = request
            if _get(store, f"confirmed_{rank}") == start_id:
                waiting.remove(rank)
        _sleep_or_time_out(deadline, f"ranks {sorted(waiting)}")
    return start_id


def _request_start_id(store: Store, rank: int, deadline: float) -> str:
    request = uuid.uuid4().hex
    store.set(f"request_{rank}", request)
    while True:
        answered, _, start_id = _get(store, f"answer_{rank}").partition(" ")
        if answered == request:
            store.set(f"confirmed_{rank}", start_id)
            return start_id
        _sleep_or_time_out(deadline, "rank 0")


def _get(store: Store, key: str) -> str:
    """Return the value of a key, or "" if the key is not set. ``Store.get`` would wait until the key is set."""
    return store.get(key).decode() if store.check([key]) else ""


def _sleep_or_time_out(deadline: float, missing: str) -> None:
    if time.monotonic() > deadline:
        raise TimeoutError(f"timed out at the start of the run, waiting for {missing}")
    time.sleep(_POLL_S)
