"""The journal survives a crash at any byte."""

from __future__ import annotations

from pathlib import Path

import pytest

from data_tools.errors import DataError
from data_tools.journal import JOURNAL_NAME, Journal
from data_tools.shards import ShardRecord

IDENTITY = {"source": {"kind": "text"}}
SHARDS = [ShardRecord(f"train_{index:06d}.npy", "train", 10, 1, 30, "a" * 64) for index in range(2)]


def write_journal(folder: Path) -> bytes:
    journal = Journal(folder, IDENTITY)
    for shard in SHARDS:
        journal.append(shard)
    journal.close()
    return (folder / JOURNAL_NAME).read_bytes()


def test_it_says_who_and_what_was_finished(tmp_path: Path) -> None:
    write_journal(tmp_path)
    journal = Journal(tmp_path, {"source": {"kind": "other"}})
    assert journal.identity == IDENTITY
    assert journal.shards == SHARDS


def test_cut_anywhere_it_keeps_every_whole_line(tmp_path: Path) -> None:
    content = write_journal(tmp_path)
    path = tmp_path / JOURNAL_NAME
    for size in range(len(content)):
        path.write_bytes(content[:size])
        journal = Journal(tmp_path, IDENTITY)
        assert journal.identity == IDENTITY
        assert journal.shards == SHARDS[: max(0, content[:size].count(b"\n") - 1)]
        for shard in SHARDS[len(journal.shards) :]:
            journal.append(shard)
        journal.close()
        assert path.read_bytes() == content


def test_it_locks_the_folder(tmp_path: Path) -> None:
    first = Journal(tmp_path, IDENTITY)
    with pytest.raises(DataError, match="being written by another process"):
        Journal(tmp_path, IDENTITY)
    first.close()
    Journal(tmp_path, IDENTITY).close()


def test_removed_it_is_gone(tmp_path: Path) -> None:
    Journal(tmp_path, IDENTITY).remove()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("line", [b"nonsense\n", b"[]\n", b'{"file": "../x"}\n', b"\xff\n"])
def test_damage_in_its_middle_is_refused(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / JOURNAL_NAME
    path.write_bytes(write_journal(tmp_path) + line)
    with pytest.raises(DataError, match=JOURNAL_NAME):
        Journal(tmp_path, IDENTITY)
