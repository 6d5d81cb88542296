"""How the ranks of a run find each other, also when a launcher starts them again."""

from __future__ import annotations

import time
import uuid
from datetime import timedelta

from torch._C._distributed_c10d import HashStore, PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

_POLL_S = 0.02


def open_store(rank: int, size: int, timeout: timedelta) -> Store:
    """A key-value store that the ranks of this start share, and that knows nothing of earlier ones.

    torchrun keeps one store from restart to restart: ranks that found the addresses of their dead predecessors in
    it would wait for them. A world of one needs no port: the store lives in this process.

    Raises:
        TimeoutError: a rank has not come.
    """
    if size == 1:
        return HashStore()
    store = next(rendezvous("env://", timeout=timeout))[0]
    deadline = time.monotonic() + timeout.total_seconds()
    start = _invite(store, size, deadline) if rank == 0 else _join(store, rank, deadline)
    return PrefixStore(start, store)


def _invite(store: Store, size: int, deadline: float) -> str:
    """Name this start, tell every rank that asks, and return once each has heard it.

    What a rank of an earlier start has asked or heard is never mistaken: asking carries a name of its own.
    """
    start = uuid.uuid4().hex
    answered: dict[int, str] = {}
    waiting = set(range(1, size))
    while waiting:
        for rank in list(waiting):
            asked = _peek(store, f"asks_{rank}")
            if asked and answered.get(rank) != asked:
                store.set(f"answer_{rank}", f"{asked} {start}")
                answered[rank] = asked
            if _peek(store, f"heard_{rank}") == start:
                waiting.remove(rank)
        _pause(deadline, f"ranks {sorted(waiting)} have")
    return start


def _join(store: Store, rank: int, deadline: float) -> str:
    """Ask rank 0 for the name of this start."""
    name = uuid.uuid4().hex
    store.set(f"asks_{rank}", name)
    while True:
        asked, _, start = _peek(store, f"answer_{rank}").partition(" ")
        if asked == name:
            store.set(f"heard_{rank}", start)
            return start
        _pause(deadline, "rank 0 has")


def _peek(store: Store, key: str) -> str:
    """The value of a key, or "" where there is none: ``get`` would wait for it."""
    return store.get(key).decode() if store.check([key]) else ""


def _pause(deadline: float, who: str) -> None:
    if time.monotonic() > deadline:
        raise TimeoutError(f"{who} not come to the start of the run")
    time.sleep(_POLL_S)
