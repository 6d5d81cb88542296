"""Exchange heartbeats between ranks. If a rank dies or hangs, the other ranks exit and name the lost rank."""

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

INTERVAL_S = 1.0
_LOST = "lost"
_LOST_STORE = "rank 0, or the launcher on its node"
_LOST_MESSAGE = "lost {}; run the same command again to continue from the last checkpoint"


class Heartbeat:
    """A thread that writes this rank's heartbeat to the store every second and reads the heartbeats of other ranks.

    Rank 0 watches all ranks. The other ranks watch rank 0 and read from the store which ranks rank 0 has lost. The
    number of requests therefore grows only linearly with the world size. If a rank has been silent for ``timeout_s``,
    the thread prints the rank's name and ends the process with ``LostRankError.exit_status``, because the main thread
    may hang in a collective.
    """

    def __init__(self, world: World, timeout_s: float) -> None:
        assert world.store is not None
        self.rank, self.size = world.rank, world.size
        self.timeout_s = timeout_s
        # Use a separate connection. On a shared connection, a waiting request of the main thread would block this one.
        self._store: Store = PrefixStore("heartbeat", world.store.clone())  # type: ignore[attr-defined]
        self._store.set(f"name_{self.rank}", f"{socket.gethostname()}, pid {os.getpid()}")
        self._store.set(f"beat_{self.rank}", "0")
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    def start(self) -> None:
        """Start the thread. Call this after a barrier, because every rank must have constructed its heartbeat."""
        self._thread.start()

    def stop(self) -> None:
        """Stop the thread. Call this after a barrier, so that no other rank expects further heartbeats."""
        self._stopped.set()

    def find_lost(self) -> str | None:
        """Return the names of the ranks that send no heartbeat within a few seconds, or None if all ranks send one."""
        others = [rank for rank in range(self.size) if rank != self.rank]
        try:
            before = self._beats(others)
            time.sleep(3 * INTERVAL_S)
            after = self._beats(others)
            return self._describe([rank for rank in others if before[rank] == after[rank]]) or None
        except RuntimeError:  # the store is gone with the process that held it
            return _LOST_STORE

    def _run(self) -> None:
        watched = [0] if self.rank else list(range(1, self.size))
        beats: dict[int, bytes] = {}
        heard_at = dict.fromkeys(watched, time.monotonic())
        beat, last_turn = 0, time.monotonic()
        while not self._stopped.wait(INTERVAL_S):
            now = time.monotonic()
            if now - last_turn > self.timeout_s / 2:  # this process itself was suspended
                heard_at = dict.fromkeys(watched, now)
            last_turn = now
            beat += 1
            try:
                self._store.set(f"beat_{self.rank}", str(beat))
                for rank, heard in self._beats(watched).items():
                    if beats.get(rank) != heard:
                        beats[rank], heard_at[rank] = heard, now
                lost = self._describe([rank for rank in watched if now - heard_at[rank] > self.timeout_s])
                if lost and self.rank == 0:
                    self._store.set(_LOST, lost)
                elif not lost and self._store.check([_LOST]):
                    lost = self._store.get(_LOST).decode()
            except RuntimeError:
                lost = _LOST_STORE
            if lost:
                self._exit(lost)

    def _beats(self, ranks: list[int]) -> dict[int, bytes]:
        return dict(zip(ranks, self._store.multi_get([f"beat_{rank}" for rank in ranks]), strict=True))

    def _describe(self, ranks: list[int]) -> str:
        return ", ".join(f"rank {rank} ({self._store.get(f'name_{rank}').decode()})" for rank in ranks)

    def _exit(self, lost: str) -> None:
        """End the process after a delay, in which the other ranks can read the same message from the store."""
        if self._stopped.wait(3 * INTERVAL_S):
            return
        print(f"error: {_LOST_MESSAGE.format(lost)}: silent for {self.timeout_s:.0f} s", file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(LostRankError.exit_status)


@contextmanager
def heartbeat(world: World, timeout_s: float) -> Iterator[None]:
    """Watch the other ranks inside the block. All ranks leave the block together.

    Raises LostRankError if a collective failed because a rank is gone.
    """
    if world.size == 1:
        yield
        return
    watch = Heartbeat(world, timeout_s)
    world.barrier()
    watch.start()
    try:
        yield
        world.barrier()
    except RuntimeError as error:
        if lost := watch.find_lost():
            raise LostRankError(_LOST_MESSAGE.format(lost)) from error
        raise
    finally:
        watch.stop()
