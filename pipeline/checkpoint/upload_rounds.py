"""Divide the upload of a checkpoint among the ranks, through the run's key-value store.

One *round* uploads the tensor files of one checkpoint:

1. Rank 0 writes into the store which files each rank uploads.
2. Each rank uploads its files, and writes its result into the store.
3. Rank 0 reads the results of all ranks.

One thread serves the store to thousands of ranks, so each rank sends only a few requests. Each rank reads only its own
entry. Rank 0 reads the results of all ranks with one request.
"""

import json
import time
from dataclasses import asdict, dataclass

from pipeline.checkpoint.layout import parse_tensor_file
from pipeline.checkpoint.manifest import FileEntry, Files
from pipeline.distributed.rank_records import NAMED_RANKS
from pipeline.distributed.rendezvous import list_ranks
from pipeline.distributed.world import World

_POLL_S = 0.2
#: The number of times that rank 0 has begun a round or ended the rounds. A waiting rank reads only this number.
_CHANGES = "changes"
_END = "end"
#: Each rank has one share and one result in the store. A new round overwrites them, so that the store does not grow.
_SHARE, _RESULT = "share_{rank}", "result_{rank}"
_FINISHED = "finished_{round}"  # how many ranks have written their result


@dataclass(frozen=True)
class Share:
    """The files that one rank uploads in one round."""

    round: int
    step: int
    files: Files


class UploadRounds:
    """The rounds of a run, as one rank sees them.

    Args:
        timeout_s: how long rank 0 waits for the results of one round.
    """

    def __init__(self, world: World, timeout_s: float) -> None:
        self._rank, self._size = world.rank, world.size
        self._timeout_s = timeout_s
        self._store = world.connect_to_store("mirror")
        self._round = 0  # rank 0: the newest round. Other ranks: the newest round that this rank knows
        self._deadline = 0.0
        self._changes = 0  # the last value of ``_CHANGES`` that this rank has read
        self.have_ended = False

    # Methods of rank 0

    def begin(self, step: int, files: Files) -> Files:
        """Begin a round, and return the tensor files that rank 0 uploads. ``files`` are all files of the checkpoint.

        Rank ``r % world_size`` uploads the files that rank r saved. The world size may have changed since the save.
        """
        self._round += 1
        self._deadline = time.monotonic() + self._timeout_s
        shares: list[dict[str, FileEntry]] = [{} for _ in range(self._size)]
        for name, entry in files.items():
            if rank_and_group := parse_tensor_file(name):
                shares[rank_and_group[0] % self._size][name] = entry
        values = {_RESULT.format(rank=rank): "" for rank in range(1, self._size)}
        for rank in range(1, self._size):
            values[_SHARE.format(rank=rank)] = json.dumps(asdict(Share(self._round, step, shares[rank])))
        if values:
            self._store.multi_set(list(values), list(values.values()))  # type: ignore[attr-defined]
        self._store.add(_CHANGES, 1)
        return shares[0]

    def collect(self) -> list[str]:
        """Wait until the other ranks have finished the round. Return the problems of at most ``NAMED_RANKS`` ranks."""
        keys = [_RESULT.format(rank=rank) for rank in range(1, self._size)]
        finished = _FINISHED.format(round=self._round)
        while self._store.add(finished, 0) < len(keys) and time.monotonic() < self._deadline:
            time.sleep(_POLL_S)
        problems: list[str] = []
        late: list[int] = []
        for rank, text in enumerate(self._store.multi_get(keys) if keys else [], start=1):
            number, problem = json.loads(text) if text else (0, "")
            if number != self._round:
                late.append(rank)
            elif problem:
                problems.append(problem)
        if len(problems) > NAMED_RANKS:
            problems[NAMED_RANKS:] = [f"{len(problems) - NAMED_RANKS} more ranks have failed"]
        if late:
            problems.append(f"no result from {list_ranks(late)} in {self._timeout_s:.0f} s")
        return problems

    def end(self) -> None:
        """Tell the other ranks that there are no more rounds. Any thread of rank 0 may call this."""
        self._store.set(_END, "")
        self._store.add(_CHANGES, 1)

    # Methods of the other ranks

    def next_share(self) -> Share | None:
        """Return the files that this rank uploads in a new round. If no new round has begun, return None at once.

        A late rank gets only the newest round. After the last round, ``have_ended`` becomes True.
        """
        changes = self._store.add(_CHANGES, 0)
        if changes == self._changes:
            return None
        self._changes = changes
        self.have_ended = self._store.check([_END])
        if self.have_ended:
            return None
        content = json.loads(self._store.get(_SHARE.format(rank=self._rank)))
        share = Share(**{**content, "files": {name: FileEntry(**entry) for name, entry in content["files"].items()}})
        if share.round == self._round:
            return None
        self._round = share.round
        return share

    def report(self, share: Share, problem: str) -> None:
        """Tell rank 0 that this rank has finished its share. ``problem`` is "" if the upload succeeded."""
        self._store.set(_RESULT.format(rank=self._rank), json.dumps([share.round, problem]))
        self._store.add(_FINISHED.format(round=share.round), 1)
