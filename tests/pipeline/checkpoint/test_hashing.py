"""The checkpoint is hashed before the run needs the hashes, and no change of a file is missed."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from data_tools.storage.sha256 import sha256_of_file, start_hashing
from pipeline.checkpoint import hashing
from pipeline.checkpoint.hashing import find_likely_start, hashing_in_background
from pipeline.checkpoint.verification import find_damage, newest_good_checkpoint
from tests.pipeline.checkpoint.conftest import MOMENTS, WEIGHTS, Save


def test_the_likely_start_is_the_newest_checkpoint_of_the_run_or_the_named_one(save: Save, tmp_path: Path) -> None:
    older, newer = save(2), save(3)
    new_run = tmp_path / "new"
    assert find_likely_start(tmp_path, "auto") == [newer / MOMENTS, newer / WEIGHTS]
    assert find_likely_start(new_run, str(tmp_path)) == [newer / MOMENTS, newer / WEIGHTS]
    assert find_likely_start(new_run, str(older)) == [older / MOMENTS, older / WEIGHTS]
    assert find_likely_start(new_run, "auto") == find_likely_start(new_run, "s3://bucket/run") == []


def test_only_rank_0_hashes(save: Save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save()
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert find_likely_start(tmp_path, "auto") == []


def test_the_hashes_of_the_second_process_are_used(save: Save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = find_likely_start(tmp_path, str(save()))
    expected = [sha256_of_file(path) for path in paths]
    with hashing_in_background(paths) as hash_file:
        monkeypatch.setattr(hashing, "sha256_of_file", None)
        assert [hash_file(path) for path in paths] == expected


@pytest.mark.parametrize(("cores", "threads"), [(3, 3), (64, 8)])
def test_the_second_process_uses_no_more_cores_than_this_process_may_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cores: int, threads: int
) -> None:
    (tmp_path / "file").touch()
    started: list[int] = []

    def start_and_record(paths: Sequence[Path], threads: int) -> subprocess.Popen[str]:
        started.append(threads)
        return start_hashing(paths, threads)

    monkeypatch.setattr(hashing, "available_cores", lambda: cores)
    monkeypatch.setattr(hashing, "start_hashing", start_and_record)
    with hashing_in_background([tmp_path / "file"]):
        assert started == [threads]


def test_a_change_after_the_hashes_were_started_is_found(save: Save, tmp_path: Path) -> None:
    older, newer = save(2), save(3)
    with hashing_in_background(find_likely_start(tmp_path, "auto")) as hash_file:
        assert newest_good_checkpoint(tmp_path, hash_file) == newer
        content = bytearray((newer / WEIGHTS).read_bytes())
        content[-1] ^= 1
        (newer / WEIGHTS).write_bytes(content)
        assert find_damage(newer, hash_file) == find_damage(newer)
        assert newest_good_checkpoint(tmp_path, hash_file) == older
        (newer / MOMENTS).unlink()
        assert find_damage(newer, hash_file) == find_damage(newer)


@pytest.mark.parametrize("place", ["missing", "unreadable"])
def test_a_file_that_the_second_process_cannot_read(place: str, save: Save, tmp_path: Path) -> None:
    path = save() / WEIGHTS
    with hashing_in_background([tmp_path / place, path]) as hash_file:
        if place == "unreadable":
            (tmp_path / place).mkdir()
        assert hash_file(path) == sha256_of_file(path)
        with pytest.raises(OSError):
            hash_file(tmp_path / place)


def test_the_second_process_does_not_outlive_the_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    processes: list[subprocess.Popen[str]] = []

    def start_and_record(paths: Sequence[Path], threads: int) -> subprocess.Popen[str]:
        processes.append(start_hashing(paths, threads))
        return processes[-1]

    monkeypatch.setattr(hashing, "start_hashing", start_and_record)
    with open(tmp_path / "large", "wb") as file:
        file.truncate(1 << 36)  # a sparse file that takes most of a minute to hash
    with pytest.raises(KeyboardInterrupt), hashing_in_background([tmp_path / "large"]):
        assert processes[0].poll() is None
        raise KeyboardInterrupt
    assert processes[0].returncode == -signal.SIGKILL
