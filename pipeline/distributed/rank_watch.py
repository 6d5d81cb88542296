"""Signs of life between ranks: who waits for a rank that is gone ends, and says which."""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from torch._C._distributed_c10d import PrefixStore, Store

from pipeline.distributed.world import World
from pipeline.errors import LostRankError

BEAT_S = 1.0
_KEY_PREFIX = "rank_watch"
_LOST = "lost"


class RankWatch:
    """A thread that gives a sign of life every second and looks for those of others.

    Rank 0 watches all, the others watch rank 0 and what it reports: the shared store serves a number of
    requests in proportion to the ranks. A rank that is silent for ``timeout_s`` ends this process with
    ``LostRankError.exit_status``, after one line with its name: the main thread may hang in a collective.
    """

    def __init__(self, world: World, timeout_s: float) -> None:
        assert world.store is not None
        self.rank, self.size = world.rank, world.size
        self.timeout_s = timeout_s
        # A connection of its own: a wait of the main thread on the other one would hold it up.
        self._store: Store = PrefixStore(_KEY_PREFIX, world.store.clone())  # type: ignore[attr-defined]
        self._store.set(f"name_{self.rank}", f"{socket.gethostname()}, pid {os.getpid()}")
        self._store.set(f"beat_{self.rank}", "0")
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="rank watch", daemon=True)

    def start(self) -> None:
        """Begin to watch. All ranks have been constructed (a barrier lies between)."""
        self._thread.start()

    def stop(self) -> None:
        """No rank is expected to show itself any longer. All ranks have come to their end (a barrier lies before)."""
        self._stopped.set()

    def find_lost(self) -> str | None:
        """Who shows no sign of life now, found within a few seconds; None: everyone does."""
        ranks = [rank for rank in range(self.size) if rank != self.rank]
        try:
            before = self._beats(ranks)
            time.sleep(3 * BEAT_S)
            after = self._beats(ranks)
            silent = [rank for rank in ranks if before[rank] == after[rank]]
            return ", ".join(map(self._describe, silent)) or None
        except RuntimeError:  # the store went with the process that held it
            return "rank 0, or the launcher on its node"

    def _run(self) -> None:
        watched = [rank for rank in range(self.size) if rank != self.rank] if self.rank == 0 else [0]
        beats: dict[int, bytes] = {}
        heard_at = dict.fromkeys(watched, time.monotonic())
        beat, last_turn = 0, time.monotonic()
        while not self._stopped.wait(BEAT_S):
            now = time.monotonic()
            if now - last_turn > self.timeout_s / 2:  # this process itself stood still
                heard_at = dict.fromkeys(watched, now)
            last_turn = now
            beat += 1
            try:
                self._store.set(f"beat_{self.rank}", str(beat))
                for rank, heard in self._beats(watched).items():
                    if beats.get(rank) != heard:
                        beats[rank], heard_at[rank] = heard, now
                silent = [rank for rank in watched if now - heard_at[rank] > self.timeout_s]
                lost = ", ".join(map(self._describe, silent))
                if lost and self.rank == 0:
                    self._store.set(_LOST, lost)
                elif not lost and self._store.check([_LOST]):
                    lost = self._store.get(_LOST).decode()
            except RuntimeError:
                lost = "rank 0, or the launcher on its node"
            if lost:
                self._end(lost)

    def _beats(self, ranks: list[int]) -> dict[int, bytes]:
        return dict(zip(ranks, self._store.multi_get([f"beat_{rank}" for rank in ranks]), strict=True))

    def _describe(self, rank: int) -> str:
        return f"rank {rank} ({self._store.get(f'name_{rank}').decode()})"

    def _end(self, lost: str) -> None:
        """Leave the process, whatever the main thread does; the others have time to read the same."""
        if self._stopped.wait(3 * BEAT_S):
            return
        print(f"error: {lost_message(lost)}: silent for {self.timeout_s:.0f} s", file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(LostRankError.exit_status)


def lost_message(lost: str) -> str:
    """What every survivor says."""
    return f"lost {lost}; run the same command again to continue from the last checkpoint"


@contextmanager
def watching_ranks(world: World, timeout_s: float) -> Iterator[None]:
    """Watch the other ranks inside; the ranks leave it together.

    Raises:
        LostRankError: a collective failed inside because a rank is gone; names it.
    """
    if world.size == 1:
        yield
        return
    watch = RankWatch(world, timeout_s)
    world.barrier()
    watch.start()
    try:
        yield
        world.barrier()
    except RuntimeError as error:
        if lost := watch.find_lost():
            raise LostRankError(lost_message(lost)) from error
        raise
    finally:
        watch.stop()
