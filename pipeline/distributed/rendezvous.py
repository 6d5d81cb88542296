"""Let the ranks of a run find each other, also after the launcher has restarted them."""

import time
import uuid
from datetime import timedelta

from torch._C._distributed_c10d import HashStore, PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

_POLL_S = 0.02


def open_store(rank: int, size: int, timeout: timedelta) -> Store:
    """Return a key-value store that the ranks share, without the keys of earlier starts.

    torchrun keeps one store across restarts. If the ranks found the addresses of earlier, dead ranks in the store, they
    would wait for these ranks. The store of a single process is in memory and needs no port.

    Raises TimeoutError if a rank is missing.
    """
    if size == 1:
        return HashStore()
    store = next(rendezvous("env://", timeout=timeout))[0]
    deadline = time.monotonic() + timeout.total_seconds()
    start_id = _publish_start_id(store, size, deadline) if rank == 0 else _request_start_id(store, rank, deadline)
    return PrefixStore(start_id, store)


def _publish_start_id(store: Store, size: int, deadline: float) -> str:
    """Choose an id for this start, send it to every rank that asks, and return it when all ranks have confirmed it.

    Each request has its own id, so that a rank recognizes an answer to a request of an earlier start.
    """
    start_id = uuid.uuid4().hex
    answered: dict[int, str] = {}
    waiting = set(range(1, size))
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
