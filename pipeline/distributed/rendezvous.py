"""Connect the ranks of a run with each other, even after the launcher has restarted them."""

import errno
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta

from torch._C._distributed_c10d import HashStore, PrefixStore, Store, TCPStore
from torch.distributed import DistNetworkError

from pipeline.distributed.environment import gloo_interface, launcher_holds_store, master_address, unset_command
from pipeline.distributed.error_messages import print_error, prints_for_node, report
from pipeline.distributed.progress import PATIENCE_S
from pipeline.errors import ConfigError, LostRankError

_ANNOUNCE_AFTER_S = 8.0
_CONNECTING_IS_SLOW_S = 30.0  # NCCL needs several seconds with many ranks
_SHORTEST_POLL_S = 0.02
#: The store gets at most this many requests per second from all waiting ranks together.
_REQUESTS_PER_S = 4000
#: The time between two checks for missing ranks.
_LOOK_S = 2.0
_MISSING = "missing"  # the key under which rank 0 writes which ranks are missing


def open_store(rank: int, size: int, timeout: timedelta) -> Store:
    """Return an empty key-value store that all ranks share.

    When torchrun restarts the ranks, torchrun's store still contains the addresses of the old processes. Therefore, the
    keys get a new prefix at each start.

    Raises:
        TimeoutError: a rank has not connected within ``timeout``.
        ConfigError: another process uses the port of the store.
    """
    if size == 1:
        return HashStore()
    missing: list[int] | None = None  # None until this rank has connected
    poll_s = max(_SHORTEST_POLL_S, size / _REQUESTS_PER_S)
    with _announced(lambda: _describe_wait(rank, size, missing), _ANNOUNCE_AFTER_S):
        store = connect(rank, size, timeout)
        missing = [0] if rank else list(range(1, size))
        deadline = time.monotonic() + timeout.total_seconds()
        if rank == 0:
            start_id = _publish_start_id(store, missing, poll_s, deadline)
        else:
            start_id = _request_start_id(store, rank, missing, poll_s, deadline)
    return PrefixStore(start_id, store)


def connect(rank: int, size: int, timeout: timedelta) -> Store:
    """Connect to the key-value store at the launcher's address. If the launcher does not run the store, rank 0 does."""
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
    """Return a port of this host on which no process listens now."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        port: int = probe.getsockname()[1]
        return port


def connecting(rank: int) -> AbstractContextManager[None]:
    """Return a context manager for the first connections between all ranks, which a firewall can block.

    If its block takes long, print what to check. If it takes longer than ``PATIENCE_S`` seconds, end the process.
    """
    return _announced(lambda: _describe_connecting(rank), _CONNECTING_IS_SLOW_S, PATIENCE_S)


@contextmanager
def _announced(describe: Callable[[], str], after_s: float, give_up_s: float | None = None) -> Iterator[None]:
    """If the block takes longer than ``after_s`` seconds, print what the block waits for.

    Args:
        give_up_s: after this number of further seconds, end the process.
    """
    done = threading.Event()

    def watch() -> None:
        if done.wait(after_s):
            return
        if prints_for_node():
            print_error(describe())
        if not done.wait(give_up_s):
            os._exit(report(LostRankError(f"gave up after {give_up_s:.0f} s: {describe()}")))

    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        done.set()


def _describe_wait(rank: int, size: int, missing: Sequence[int] | None) -> str:
    host, port = master_address()
    address = f"{host}:{port} (MASTER_ADDR, MASTER_PORT)"
    if missing is None:
        problem = f"cannot connect to {address}: check the address, and that no firewall blocks the port"
    else:
        problem = f"still waits at {address} for {list_ranks(missing)} of {size} (WORLD_SIZE)"
    return (
        f"rank {rank} on {socket.gethostname()} {problem}; if these variables are left over from another launcher: "
        f"{unset_command()}"
    )


def _describe_connecting(rank: int) -> str:
    interface = gloo_interface()
    return (
        f"rank {rank} on {socket.gethostname()} still connects to the other ranks"
        + (f" through {interface}" if interface else "")
        + "; the nodes must accept connections from each other on all ports: check the firewalls, and the variables "
        "GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME if you have set them"
    )


def list_ranks(ranks: Sequence[int]) -> str:
    """Return a text such as ``ranks 1, 2``. The text names at most eight ranks, and gives the number of the others."""
    more = f" and {len(ranks) - 8} more" if len(ranks) > 8 else ""
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks[:8]))}{more}"


def _publish_start_id(store: Store, missing: list[int], poll_s: float, deadline: float) -> str:
    """Choose an id for this start, and send it to every rank that asks. Return it when all ranks have confirmed it.

    Each request of a rank has its own random id, so no rank reads an answer of an earlier start.

    Args:
        missing: the ranks other than 0. This function removes those that have connected.
    """
    start_id = uuid.uuid4().hex
    requests = [f"request_{rank}" for rank in missing]
    confirmations = [f"confirmed_{start_id}_{rank}" for rank in missing]
    answered: set[bytes] = set()
    look_at = time.monotonic() + _LOOK_S
    while True:
        have_asked = store.check(requests)
        if have_asked and store.check(confirmations):
            return start_id
        if have_asked and (new := set(store.multi_get(requests)) - answered):
            keys = [f"answer_{request.decode()}" for request in new]
            store.multi_set(keys, [start_id] * len(keys))  # type: ignore[attr-defined]
            answered |= new
        if time.monotonic() > min(look_at, deadline):
            unset = _find_unset(store, confirmations if have_asked else requests)
            missing[:] = [int(key.rpartition("_")[2]) for key in unset]
            store.set(_MISSING, json.dumps([time.monotonic(), missing]))
            look_at = time.monotonic() + _LOOK_S
        _sleep_or_time_out(poll_s, deadline, missing)


def _request_start_id(store: Store, rank: int, missing: list[int], poll_s: float, deadline: float) -> str:
    """Ask rank 0 for the id of this start, confirm it, and return it.

    Args:
        missing: this function replaces its content by the ranks that are missing according to rank 0.
    """
    request = uuid.uuid4().hex
    store.set(f"request_{rank}", request)
    look_at, seen = time.monotonic() + _LOOK_S, None
    while not store.check([f"answer_{request}"]):  # a request that blocks would delay Ctrl-C
        if time.monotonic() > look_at:
            seen = _read_missing(store, missing, seen)
            look_at = time.monotonic() + _LOOK_S
        _sleep_or_time_out(poll_s, deadline, missing)
    start_id: str = store.get(f"answer_{request}").decode()
    store.set(f"confirmed_{start_id}_{rank}", "")
    return start_id


def _read_missing(store: Store, missing: list[int], seen: str | None) -> str | None:
    """Read which ranks are missing according to rank 0, and write them into ``missing``. Return what was read.

    The value may be from an earlier start. Therefore, ``missing`` changes only if the value differs from ``seen``.
    """
    if not store.check([_MISSING]):
        return None
    found: str = store.get(_MISSING).decode()
    ranks = json.loads(found)[1]
    if seen is not None and found != seen and ranks:
        missing[:] = ranks
    return found


def _find_unset(store: Store, keys: list[str]) -> list[str]:
    """Return the keys that are not set. This takes only a few requests per missing key."""
    if not keys or store.check(keys):
        return []
    if len(keys) == 1:
        return keys
    middle = len(keys) // 2
    return [*_find_unset(store, keys[:middle]), *_find_unset(store, keys[middle:])]


def _sleep_or_time_out(seconds: float, deadline: float, missing: Sequence[int]) -> None:
    if time.monotonic() > deadline:
        raise TimeoutError(f"timed out at the start of the run, waiting for {list_ranks(missing)}")
    time.sleep(seconds)
