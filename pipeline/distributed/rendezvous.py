"""How the ranks of a run find each other, also after the launcher has restarted them."""

import time
import uuid
from datetime import timedelta

from torch._C._distributed_c10d import HashStore, PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

_POLL_S = 0.02


def open_store(rank: int, size: int, timeout: timedelta) -> Store:
    """Return a key-value store that the ranks share, without the keys of earlier starts.

    torchrun keeps one store across restarts. If the ranks found the addresses of their dead predecessors in it, they
    would wait for them. A single process needs no port: its store is in memory.

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

    Each request has an id of its own, so that an answer to an earlier start's request is recognized as old.
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
    """Return the value of a key, or "" if it is not set: ``Store.get`` would wait for it."""
    return store.get(key).decode() if store.check([key]) else ""


def _sleep_or_time_out(deadline: float, missing: str) -> None:
    if time.monotonic() > deadline:
        raise TimeoutError(f"timed out at the start of the run, waiting for {missing}")
    time.sleep(_POLL_S)
