"""A run on an empty disk continues from a checkpoint at a URL."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from pipeline.checkpoint.download import BLOCK_BYTES, share_of_blocks
from pipeline.checkpoint.layout import list_checkpoints, step_of
from pipeline.checkpoint.manifest import CheckpointManifest, FileEntry
from pipeline.checkpoint.mirror import Mirror
from pipeline.checkpoint.pairing import abandon, is_paired
from pipeline.checkpoint.remote_run import RemoteCheckpoint, RemoteRun
from pipeline.checkpoint.verification import find_damage
from pipeline.config.schema import Config
from pipeline.distributed.world import World
from pipeline.errors import CheckpointError
from pipeline.training.remote_start import fetch_remote_start
from tests.pipeline.checkpoint.conftest import MANIFEST, MOMENTS, backend, save  # noqa: F401 - fixtures
from tests.pipeline.conftest import tiny_config

URL = "memory://bucket/run"


@pytest.fixture
def remote(save: Any, tmp_path: Path, world: World) -> Iterator[Path]:  # noqa: F811
    """Save two checkpoints, upload them to ``URL``, and delete them. Yield the empty run folder."""
    for step in (1, 2):
        save(step)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    mirror = Mirror(URL, tmp_path, world, keep_last=2, timeout_s=30)
    mirror.start()
    mirror.finish(lambda: None)
    yield tmp_path / "new"
    fsspec.filesystem("memory").rm("/bucket", recursive=True)


def start(run_folder: Path, world: World, **options: Any) -> list[int]:
    """Fetch the start of a run, and return the steps of the good checkpoints in its folder."""
    run_folder.mkdir(exist_ok=True)
    fetch_remote_start(config_of(run_folder, **options), world)
    return [step_of(folder) for folder in list_checkpoints(run_folder) if find_damage(folder) is None]


def config_of(run_folder: Path, **options: Any) -> Config:
    return tiny_config(run_folder, checkpoint=options)


@pytest.mark.parametrize(
    ("options", "step"),
    [
        ({"remote": URL}, 2),
        ({"resume": URL}, 2),
        ({"resume": f"{URL}/"}, 2),
        ({"resume": f"{URL}/checkpoints/step_00000001"}, 1),
        ({}, None),
    ],
)
def test_the_start_of_a_run_on_an_empty_disk(
    remote: Path, world: World, options: dict[str, str], step: int | None
) -> None:
    assert start(remote, world, **options) == ([] if step is None else [step])
    assert (remote / "metrics.jsonl").exists() == is_paired(remote, URL) == (step is not None)
    assert start(remote, world, **options) == ([] if step is None else [step])  # it is not downloaded again


def test_auto_takes_the_newest_of_disk_and_url(remote: Path, world: World) -> None:
    start(remote, world, resume=f"{URL}/checkpoints/step_00000001")
    assert start(remote, world, remote=URL) == [1, 2]


def test_auto_does_not_undo_a_deliberate_return(remote: Path, world: World, caplog: pytest.LogCaptureFixture) -> None:
    """The run has returned to step 1, and was stopped before it saved or reached the server."""
    start(remote, world, resume=f"{URL}/checkpoints/step_00000001")
    abandon(remote, 2)
    with caplog.at_level(logging.WARNING):
        assert start(remote, world, remote=URL) == [1]
    assert f"ignored {URL}/checkpoints/step_00000002: the run has continued from an earlier step" in caplog.text


def test_a_url_of_another_run_is_refused(remote: Path, world: World) -> None:
    with pytest.raises(CheckpointError, match=r"memory://bucket/run already holds checkpoints of another run"):
        start(remote, world, remote=URL, resume="none")
    start(remote, world, remote=URL)
    (remote / "remote.json").unlink()
    with pytest.raises(CheckpointError, match=r"memory://bucket/run already holds checkpoints of another run"):
        start(remote, world, remote=URL)
    with pytest.raises(CheckpointError, match=r"memory://bucket/none: no checkpoint here"):
        start(remote.parent / "other", world, resume="memory://bucket/none")


@pytest.mark.parametrize("fault", ["incomplete", "truncated", "changed", "manifest"])
def test_a_damaged_checkpoint_is_skipped(
    remote: Path, world: World, fault: str, caplog: pytest.LogCaptureFixture
) -> None:
    files = fsspec.filesystem("memory")
    folder = "/bucket/run/checkpoints/step_00000002"
    content = files.cat_file(f"{folder}/{MOMENTS}")
    if fault == "incomplete":
        files.rm_file(f"{folder}/{MANIFEST}")
    elif fault == "manifest":
        files.pipe_file(f"{folder}/{MANIFEST}", files.cat_file(f"{folder}/{MANIFEST}")[:-100])
    else:
        files.pipe_file(f"{folder}/{MOMENTS}", content[:-1] + (b"" if fault == "truncated" else b"?"))
    with caplog.at_level(logging.WARNING):
        assert start(remote, world, remote=URL) == [1]
    assert ("skipping a damaged checkpoint: memory://bucket/run" in caplog.text) == (fault != "incomplete")


def test_a_server_that_refuses(remote: Path, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a checkpoint on the disk, the run must not start from scratch by mistake."""

    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError("Access Denied")

    with monkeypatch.context() as faulty:
        faulty.setattr(MemoryFileSystem, "find", refuse)
        with pytest.raises(CheckpointError, match="cannot look for checkpoints.*Access Denied"):
            start(remote, world, remote=URL)
    with monkeypatch.context() as faulty:
        faulty.setattr(MemoryFileSystem, "cat_file", failing_for(MOMENTS))
        with pytest.raises(CheckpointError, match="cannot download .*step_00000002: rank 0: .*reset"):
            start(remote, world, remote=URL)
    assert not list(remote.iterdir())
    with monkeypatch.context() as faulty:
        faulty.setattr(MemoryFileSystem, "cat_file", failing_for("metrics.jsonl"))
        with pytest.raises(CheckpointError, match="cannot download .*step_00000002: rank 0: .*reset"):
            start(remote, world, remote=URL)
    assert not list_checkpoints(remote), "a run folder with a checkpoint has the metrics, and is paired with the URL"
    assert start(remote, world, remote=URL) == [2]
    with monkeypatch.context() as faulty:
        faulty.setattr(MemoryFileSystem, "find", refuse)
        assert start(remote, world, remote=URL) == [2]  # the disk has a checkpoint


def failing_for(name: str) -> Any:
    cat = MemoryFileSystem.cat_file

    def cat_file(self: Any, path: str, *arguments: Any, **options: Any) -> bytes:
        if path.endswith(name):
            raise ConnectionError("connection reset")
        return cat(self, path, *arguments, **options)

    return cat_file


@pytest.mark.parametrize("file", [MANIFEST, MOMENTS])
def test_a_server_that_fails_during_the_start(
    remote: Path, world: World, monkeypatch: pytest.MonkeyPatch, file: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The run folder has a good checkpoint, so the run starts from it."""
    start(remote, world, resume=f"{URL}/checkpoints/step_00000001")
    monkeypatch.setattr(MemoryFileSystem, "cat_file", failing_for(file))
    with caplog.at_level(logging.WARNING):
        assert start(remote, world, remote=URL) == [1]
    assert "connection reset; the run starts" in caplog.text


def test_a_damaged_checkpoint_on_the_disk_is_replaced(remote: Path, world: World) -> None:
    start(remote, world, remote=URL)
    (remote / "checkpoints" / "step_00000002" / MOMENTS).write_bytes(b"half")
    assert start(remote, world, remote=URL) == [2]


@pytest.mark.parametrize("file", [MANIFEST, MOMENTS])
def test_a_url_with_only_damaged_checkpoints_is_no_new_run(remote: Path, world: World, file: str) -> None:
    files = fsspec.filesystem("memory")
    for step in (1, 2):
        path = f"/bucket/run/checkpoints/step_{step:08d}/{file}"
        files.pipe_file(path, files.cat_file(path)[:-1] + b"?")
    for options in ({"remote": URL}, {"remote": URL, "resume": URL})[: 2 if file == MOMENTS else 1]:
        with pytest.raises(CheckpointError, match="memory://bucket/run: this program can use none of the checkpoints"):
            start(remote, world, **options)
    assert not list_checkpoints(remote)


def test_a_run_does_not_continue_from_one_url_and_upload_to_that_of_another_run(remote: Path, world: World) -> None:
    fsspec.filesystem("memory").cp("/bucket/run", "/bucket/other", recursive=True)
    with pytest.raises(CheckpointError, match="memory://bucket/other already holds checkpoints of another run"):
        start(remote, world, remote="memory://bucket/other", resume=URL)
    assert start(remote, world, remote="memory://bucket/new", resume=URL) == [2]


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_the_ranks_share_the_blocks(size: int) -> None:
    """All ranks together read each byte once, and no rank reads more than a block more than its share."""
    sizes = {"a": 5 * BLOCK_BYTES + 1, "b": 3, "c": 0, "d": 2 * BLOCK_BYTES}
    manifest = CheckpointManifest({}, {}, {name: FileEntry(n, "0" * 64) for name, n in sizes.items()})
    checkpoint = RemoteCheckpoint(RemoteRun(URL), 1, b"", manifest, {})
    shares = [share_of_blocks(checkpoint, rank, size) for rank in range(size)]
    covered = {name: 0 for name in sizes}
    for block in (block for share in shares for block in share):
        assert block.start == covered[block.file] < block.stop
        covered[block.file] = block.stop
    assert covered == sizes
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
