"""A second run in the same folder, and data that changed between two starts of a run."""

from __future__ import annotations

import shutil
from pathlib import Path

from tests.support.live_run import LiveRun
from tests.support.runs import Sections, curve_of, make_byte_corpus, merged, train_run


def test_a_second_run_in_the_folder_is_refused(sections: Sections, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with LiveRun("ddp", folder, sections, hold_after=1) as run:
        run.wait_for_step(1)
        second = train_run("fsdp", folder, sections)
        reached = run.last_step()
        assert second.returncode == 2
        assert second.stderr.startswith("error: run.out_dir: ") and f"pid {run.process.pid}" in second.stderr
        assert len(second.stderr.splitlines()) == 1
        run.release()
        run.wait_for_step(reached + 2)  # the first run is not disturbed


def test_other_data_under_the_same_path_is_refused(sections: Sections, tmp_path: Path) -> None:
    data = make_byte_corpus(tmp_path / "data", documents=30)
    sections = merged(sections, {"data": {"path": str(data)}, "schedule": {"max_steps": 4, "warmup_steps": 1}})
    curve_of("ddp", tmp_path / "run", sections)
    shutil.rmtree(data)
    make_byte_corpus(data, documents=31)
    result = train_run("ddp", tmp_path / "run", merged(sections, {"schedule": {"max_steps": 8}}))
    assert result.returncode == 2
    assert "was trained on other data" in result.stderr


def test_a_flipped_bit_in_a_shard_stops_before_the_start(sections: Sections, tmp_path: Path) -> None:
    data = make_byte_corpus(tmp_path / "data", documents=30)
    (shard, *_) = sorted(data.glob("*train*.npy"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    result = train_run("ddp", tmp_path / "run", merged(sections, {"data": {"path": str(data)}}), processes=2)
    assert result.returncode != 0
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and shard.name in lines[0] and "SHA-256" in lines[0]
