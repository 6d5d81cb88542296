"""The files of a checkpoint are divided among the ranks, and rank 0 gets the result of each rank."""

from __future__ import annotations

import pytest
import torch
from torch._C._distributed_c10d import HashStore

from pipeline.checkpoint.layout import STATE_FILE, tensor_file
from pipeline.checkpoint.manifest import FileEntry
from pipeline.checkpoint.upload_rounds import Files, UploadRounds
from pipeline.distributed.world import World


def join(ranks: int, timeout_s: float = 30.0) -> list[UploadRounds]:
    """Return the rounds as each rank sees them."""
    store = HashStore()
    return [UploadRounds(World(rank, ranks, rank, torch.device("cpu"), store), timeout_s) for rank in range(ranks)]


def files_of(ranks: int) -> Files:
    names = [tensor_file(rank, group) for rank in range(ranks) for group in ("weights", "moments")]
    return {name: FileEntry(number, "0" * 64) for number, name in enumerate([*names, STATE_FILE])}


def test_each_rank_gets_the_entries_of_its_files() -> None:
    """The checkpoint has files of four ranks, because the run had four ranks before it was resumed with three."""
    files = files_of(4)
    main, *others = join(3)
    own = main.begin(7, files)
    shares = [rounds.next_share() for rounds in others]
    assert [share and share.step for share in shares] == [7, 7]
    divided = [own, *(share.files for share in shares if share)]
    assert [sorted(share) for share in divided] == [
        sorted(name for name in files if name.startswith(tuple(f"rank_{rank:05d}" for rank in ranks)))
        for ranks in ((0, 3), (1,), (2,))
    ]
    assert all(files[name] == entry for share in divided for name, entry in share.items())
    assert [rounds.next_share() for rounds in others] == [None, None]


def test_a_late_rank_skips_rounds_and_its_old_result_does_not_count() -> None:
    main, on_time, late = join(3, timeout_s=0.0)
    main.begin(1, files_of(3))
    old = late.next_share()
    assert old is not None
    main.begin(2, files_of(3))
    main.begin(3, files_of(3))
    share = on_time.next_share()
    assert share is not None and share.step == 3
    on_time.report(share, "")
    late.report(old, "")
    assert main.collect() == ["no result from rank 2 in 0 s"]
    share = late.next_share()
    assert share is not None and share.step == 3
    late.report(share, "")
    assert main.collect() == []


def test_the_problems_of_many_ranks_are_cut() -> None:
    main, *others = join(11)
    main.begin(1, files_of(11))
    for rank, rounds in enumerate(others, start=1):
        share = rounds.next_share()
        assert share is not None
        rounds.report(share, f"rank {rank}: no" if rank > 1 else "")
    assert main.collect() == [*(f"rank {rank}: no" for rank in range(2, 6)), "5 more ranks have failed"]


@pytest.mark.parametrize("has_begun", [False, True])
def test_the_end_reaches_every_rank(has_begun: bool) -> None:
    main, other = join(2)
    if has_begun:
        main.begin(1, files_of(2))
    main.end()
    assert other.next_share() is None
    assert other.have_ended
