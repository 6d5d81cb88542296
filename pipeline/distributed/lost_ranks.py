"""Find the lost ranks, from what each rank writes to the key-value store of the heartbeats."""

import threading
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from functools import partial
from typing import TypeVar

from torch.distributed import DistStoreError

from pipeline.distributed.rank_records import RankRecords, Verdict
from pipeline.distributed.world import World

Result = TypeVar("Result")

INTERVAL_S = 1.0  # the time between two heartbeats of a rank
#: A failed rank waits at most this long for the store, because the process of the store may be dead.
_STORE_TIMEOUT_S = 10.0
#: A search takes three seconds. A rank waits at most this long for another rank's search, and then searches itself.
#: Must be less than ``_STORE_TIMEOUT_S``.
_SEARCH_TIMEOUT_S = 4.5
#: The id of the newest search for the lost ranks, and the answer for all ranks.
_SEARCH, _FOUND = "search", "found"
LOST_STORE = "lost rank 0, or the launcher on its node"


def find_lost(world: World) -> str | None:
    """Return a text that names the lost ranks, or None if no rank is lost.

    A rank is lost if it has failed or sends no heartbeat during this call. The call takes a few seconds.

    The first rank that makes this call reads the heartbeats, and the other ranks wait for the result. If no result
    arrives in time, one of the waiting ranks reads the heartbeats.
    """
    search, found = "", None
    deadline = time.monotonic() + 2 * _STORE_TIMEOUT_S
    while found is None:
        if time.monotonic() > deadline:
            found = LOST_STORE
            break
        otherwise: tuple[str, str | None] = (search, LOST_STORE)
        search, found = _within_store_timeout(partial(_search_or_wait, world, search), otherwise)
    if found == LOST_STORE and world.ending.verdict:  # was read before the store ended
        return world.ending.verdict
    return found or None


def _search_or_wait(world: World, given_up: str) -> tuple[str, str | None]:
    """Search for the lost ranks, or wait until another rank has found them.

    Args:
        given_up: the id of the search for which this rank has waited too long, or "".

    Returns:
        The id of the newest search, and a text that names the lost ranks. The text is "" if no rank is lost, and None
        if the search is not finished.
    """
    records = RankRecords(world)
    store = records.store
    own = uuid.uuid4().hex
    search = store.compare_set(_SEARCH, given_up, own).decode()  # only one rank can replace an id
    if search != own:
        with suppress(DistStoreError):
            store.wait([_FOUND], timedelta(seconds=_SEARCH_TIMEOUT_S))
    elif not store.check([_FOUND]):
        lost = _search_for_lost(records, world)
        if not store.check([_FOUND]):
            store.set(_FOUND, f"lost {records.describe(lost)}" if lost else "")
    if verdict := records.read_verdict():
        return search, verdict.reason
    return search, store.get(_FOUND).decode() if store.check([_FOUND]) else None


def _search_for_lost(records: RankRecords, world: World) -> list[int]:
    others = [rank for rank in range(world.size) if rank != world.rank]
    before = records.read_beats(others)
    time.sleep(3 * INTERVAL_S)
    after = records.read_beats(others)
    return [rank for rank, was, now in zip(others, before, after, strict=True) if was == now]


def publish_failure(world: World, reason: str) -> None:
    """Tell the other ranks that this rank has failed, because they may wait for this rank in a collective."""

    def publish() -> None:
        records = RankRecords(world)
        if not records.read_verdict():
            records.write_verdict(Verdict(f"lost {records.describe([world.rank])}, which failed: {reason}"))
            if world.rank == 0:  # the store may end with this process, so the other ranks must read the verdict before
                time.sleep(2 * INTERVAL_S)

    _within_store_timeout(publish, None)


def _within_store_timeout(request: Callable[[], Result], otherwise: Result) -> Result:
    """Return the result of requests to the store. If the store does not answer in time, return ``otherwise``."""
    results = [otherwise]

    def call() -> None:
        with suppress(RuntimeError):  # the process with the store has ended
            results[0] = request()

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(_STORE_TIMEOUT_S)
    return results[0]
