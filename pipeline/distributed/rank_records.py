"""Read and write what the ranks tell each other through the key-value store of the heartbeats."""

import json
import os
import socket
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from pipeline.distributed.world import World

#: A message names at most this many ranks that are in the same state, and says how many others there are.
NAMED_RANKS = 4
_VERDICT = "verdict"


@dataclass(frozen=True)
class Verdict:
    """The reason why the run ends, such as a lost rank. All ranks read it from the store."""

    reason: str
    stuck: tuple[int, ...] = ()  # the ranks whose main thread is stuck


class RankRecords:
    """The name and the newest heartbeat of each rank, and the verdict.

    If the process of the store has ended, all methods raise RuntimeError.
    """

    def __init__(self, world: World) -> None:
        self.store = world.connect_to_store("heartbeat")

    def introduce(self, rank: int) -> None:
        """Write the host and the process of a rank, and an empty heartbeat. Rank 0 also writes an empty verdict."""
        self.store.set(_name_key(rank), f"{socket.gethostname()}, pid {os.getpid()}")
        self.write_beat(rank, "")
        if rank == 0:
            self.store.set(_VERDICT, "")

    def write_beat(self, rank: int, beat: str) -> None:
        """Replace the heartbeat of a rank."""
        self.store.set(_beat_key(rank), beat)

    def read_beats(self, ranks: Sequence[int]) -> list[bytes]:
        """Return the newest heartbeat of each rank."""
        return self.store.multi_get(list(map(_beat_key, ranks))) if ranks else []

    def read_verdict_and_beats(self, ranks: Sequence[int]) -> tuple[Verdict | None, list[bytes]]:
        """Return the verdict and the newest heartbeat of each rank, with a single request. All must exist."""
        verdict, *beats = self.store.multi_get([_VERDICT, *map(_beat_key, ranks)])
        return _parse_verdict(verdict), beats

    def read_verdict(self) -> Verdict | None:
        """Return the verdict, or None if there is none yet."""
        return _parse_verdict(self.store.get(_VERDICT)) if self.store.check([_VERDICT]) else None

    def write_verdict(self, verdict: Verdict) -> None:
        """Write the verdict for all ranks."""
        self.store.set(_VERDICT, json.dumps(asdict(verdict)))

    def name(self, rank: int) -> str:
        """Return the host and the process of a rank as text."""
        return self.store.get(_name_key(rank)).decode()

    def describe(self, ranks: Sequence[int]) -> str:
        """Return a text that names the first few ranks, and counts the rest."""
        named = [f"rank {rank} ({self.name(rank)})" for rank in ranks[:NAMED_RANKS]]
        more = f" and {len(ranks) - NAMED_RANKS} more" if len(ranks) > NAMED_RANKS else ""
        return ", ".join(named) + more


def _parse_verdict(text: bytes) -> Verdict | None:
    return Verdict(**json.loads(text)) if text else None


def _beat_key(rank: int) -> str:
    return f"beat_{rank}"


def _name_key(rank: int) -> str:
    return f"name_{rank}"
