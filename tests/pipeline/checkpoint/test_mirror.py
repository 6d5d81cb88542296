"""A mirror uploads checkpoints to a URL. A checkpoint there is complete or not there, and old ones are deleted."""

from __future__ import annotations

import errno
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import fsspec
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem
from torch._C._distributed_c10d import HashStore

from pipeline.backends.ddp import DdpBackend
from pipeline.checkpoint import mirror as mirror_module
from pipeline.checkpoint.background import BackgroundSaver
from pipeline.checkpoint.download import DamagedAtUrlError, download_checkpoint
from pipeline.checkpoint.layout import checkpoint_folder, list_checkpoints, step_of
from pipeline.checkpoint.mirror import Mirror, UploadOutcome
from pipeline.checkpoint.pairing import abandon, is_abandoned, is_paired
from pipeline.checkpoint.remote_run import ABANDONED_MANIFEST, RemoteRun
from pipeline.checkpoint.remote_search import find_checkpoints
from pipeline.checkpoint.upload_rounds import UploadRounds
from pipeline.checkpoint.verification import find_damage
from pipeline.config.loading import dump_config
from pipeline.distributed.world import World
from tests.pipeline.checkpoint.conftest import FILES, MANIFEST, MOMENTS, WEIGHTS, Save, seal, state_of, train_steps
from tests.pipeline.conftest import tiny_config
from tests.support.checkpoints import save_checkpoint

ROOT = "/bucket/run"


@pytest.fixture
def url() -> Iterator[str]:
    yield f"memory:/{ROOT}"
    files = fsspec.filesystem("memory")
    if files.exists("/bucket"):
        files.rm("/bucket", recursive=True)


@pytest.fixture
def upload(tmp_path: Path, world: World, url: str) -> Callable[..., list[UploadOutcome]]:
    """Upload what is missing at the URL, as after a save, and return the outcomes."""

    def upload(keep_last: int = 2, timeout_s: float = 30.0) -> list[UploadOutcome]:
        mirror = Mirror(url, tmp_path, world, keep_last=keep_last, timeout_s=timeout_s)
        mirror.start()
        return mirror.finish(lambda: None)

    return upload


Upload = Callable[..., list[UploadOutcome]]


def stored() -> dict[str, list[str]]:
    """Return step folder -> names of the files at the URL."""
    files = fsspec.filesystem("memory")
    found: dict[str, list[str]] = {}
    for path in files.find(f"{ROOT}/checkpoints"):
        found.setdefault(path.split("/")[-2], []).append(path.split("/")[-1])
    return {folder: sorted(names) for folder, names in found.items()}


def remote_file(name: str, step: int = 1) -> str:
    return f"{ROOT}/checkpoints/step_{step:08d}/{name}"


def complete_steps(url: str) -> list[int]:
    return [step for step, files in RemoteRun(url).list().items() if MANIFEST in files]


def test_the_url_holds_the_bytes_of_the_disk(tmp_path: Path, save: Save, upload: Upload, url: str) -> None:
    folder = save(1)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    (outcome,) = upload()
    size = sum((folder / name).stat().st_size for name in FILES)
    assert (outcome.step, outcome.bytes, outcome.problem) == (1, size, None)
    fetched = tmp_path / "fetched" / folder.name
    fsspec.filesystem("memory").get(f"{ROOT}/checkpoints/{folder.name}/", str(fetched), recursive=True)
    assert {name: (fetched / name).read_bytes() for name in FILES} == {
        name: (folder / name).read_bytes() for name in FILES
    }
    assert find_damage(fetched) is None
    assert RemoteRun(url).read_metrics() == b'{"step": 1}\n'
    assert upload() == []  # nothing is missing


def test_old_checkpoints_are_deleted_by_the_rules_of_the_disk(
    tmp_path: Path, world: World, backend: DdpBackend, upload: Upload, url: str
) -> None:
    config = dump_config(tiny_config(checkpoint={"keep_every_steps": 2}))
    for step in range(1, 6):
        save_checkpoint(tmp_path, state_of(backend, step), config, backend, world, 2)
        upload(keep_last=2)
        assert complete_steps(url) == [step_of(folder) for folder in list_checkpoints(tmp_path)]
    assert complete_steps(url) == [2, 4, 5]
    shutil.rmtree(tmp_path / "checkpoints" / "step_00000002")  # a milestone stays at the URL on a new machine
    upload()
    assert complete_steps(url) == [2, 4, 5]


def test_a_checkpoint_with_nan_does_not_replace_the_good_ones_at_the_url(
    tmp_path: Path, save: Save, backend: DdpBackend, world: World, upload: Upload, url: str
) -> None:
    save(1, keep_last=1)
    upload(keep_last=1)
    with torch.no_grad():
        backend.model.wpe.weight[0, 0] = torch.nan
    for step in (2, 3):
        save(step, keep_last=1)
        upload(keep_last=1)
        assert complete_steps(url) == [1, step]
    shutil.rmtree(tmp_path / "checkpoints")
    newest, good = find_checkpoints(url)
    with pytest.raises(DamagedAtUrlError, match=rf"step_00000003: {WEIGHTS} contains NaN or infinite numbers"):
        download_checkpoint(newest, tmp_path / "other", world)
    assert step_of(download_checkpoint(good, tmp_path / "other", world)) == 1


def test_what_an_interrupted_upload_left_is_deleted(save: Save, upload: Upload) -> None:
    fsspec.filesystem("memory").pipe(remote_file(WEIGHTS), b"half")
    save(2)
    upload()
    assert list(stored()) == ["step_00000002"]


@pytest.mark.parametrize("fault", ["truncated", "changed", "lost"])
def test_an_object_that_did_not_arrive_is_found(
    fault: str, save: Save, upload: Upload, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    put = MemoryFileSystem.put_file

    def put_damaged(self: Any, lpath: str, rpath: str, *arguments: Any, **options: Any) -> None:
        put(self, lpath, rpath, *arguments, **options)
        if rpath.endswith(MOMENTS):
            content = Path(lpath).read_bytes()
            if fault == "lost":
                self.rm_file(rpath)
            else:
                self.pipe_file(rpath, content[:-1] if fault == "truncated" else content[:-1] + b"?")

    save(1)
    with monkeypatch.context() as faulty:
        faulty.setattr(MemoryFileSystem, "put_file", put_damaged)
        (outcome,) = upload()
    assert outcome.problem and MOMENTS in outcome.problem and "\n" not in outcome.problem
    assert MANIFEST not in stored()["step_00000001"]
    assert [outcome.problem for outcome in upload()] == [None]
    assert complete_steps(url) == [1]


def test_a_server_that_refuses_is_tried_again_after_the_next_save(
    tmp_path: Path, world: World, save: Save, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError("Access Denied")

    mirror = Mirror(url, tmp_path, world, keep_last=2, timeout_s=30)
    with monkeypatch.context() as faulty:
        faulty.setattr(MemoryFileSystem, "put_file", refuse)
        mirror.start()
        save(1)
        mirror.request()
        (failed,) = wait_for_outcomes(mirror, 1)
    assert failed.problem == f"rank 0: cannot use {url}: PermissionError: Access Denied"
    assert (failed.action, mirror.why_missing()) == ("upload step 1 to", failed.problem)
    save(2)
    mirror.request()
    assert [(outcome.step, outcome.problem) for outcome in wait_for_outcomes(mirror, 2)] == [(2, None), (1, None)]
    assert mirror.finish(lambda: None) == []
    assert mirror.why_missing() is None


def test_a_server_that_refuses_to_delete(
    tmp_path: Path, world: World, save: Save, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The message names the action that failed. The checkpoint is uploaded."""

    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError("Access Denied")

    monkeypatch.setattr(RemoteRun, "delete", refuse)
    mirror = Mirror(url, tmp_path, world, keep_last=1, timeout_s=30)
    mirror.start()
    for step in (1, 2):
        save(step)
        mirror.request()
        uploaded = wait_for_outcomes(mirror, 1)
    uploaded += wait_for_outcomes(mirror, 2 - len(uploaded))
    assert [(outcome.step, outcome.problem) for outcome in uploaded] == [
        (2, None),
        (2, "Access Denied"),
    ]
    assert [outcome.action for outcome in uploaded] == ["upload step 2 to", "delete old files at"]
    assert mirror.finish(lambda: None)[-1].action == "delete old files at"
    assert mirror.why_missing() is None


def test_a_server_that_fails_after_the_last_upload(
    tmp_path: Path, world: World, save: Save, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The message names the action that failed, which is no deletion. The checkpoint is uploaded."""
    refuse = Mock(side_effect=PermissionError("Access Denied"))
    mirror = Mirror(url, tmp_path, world, keep_last=1, timeout_s=30)
    mirror.start()
    save(1)
    mirror.request()
    wait_for_outcomes(mirror, 1)
    with monkeypatch.context() as faulty:
        faulty.setattr(RemoteRun, "list", refuse)
        (failed,) = mirror.finish(lambda: None)
    assert (failed.action, failed.problem) == ("compare the run folder with", "Access Denied")
    assert mirror.why_missing() is None
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    monkeypatch.setattr(RemoteRun, "write_metrics", refuse)
    mirror = Mirror(url, tmp_path, world, keep_last=1, timeout_s=30)
    mirror.start()
    assert [outcome.action for outcome in mirror.finish(lambda: None)] == ["upload metrics.jsonl to"]
    assert mirror.why_missing() is None


def test_a_step_that_is_saved_again_is_missing_until_it_is_uploaded_again(
    tmp_path: Path, world: World, save: Save, backend: DdpBackend, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run went back, and the server is down when it reaches the step again: the URL has the old weights."""
    mirror = Mirror(url, tmp_path, world, keep_last=2, timeout_s=30)
    mirror.start()
    save(1)
    mirror.request()
    wait_for_outcomes(mirror, 1)
    monkeypatch.setattr(RemoteRun, "list", Mock(side_effect=ConnectionRefusedError("Connection refused")))
    train_steps(backend, 1)
    save(1)
    assert mirror.finish(lambda: None)[-1].problem == mirror.why_missing() == "Connection refused"


def test_a_run_folder_that_cannot_be_listed_once_is_a_failed_upload(
    tmp_path: Path, world: World, save: Save, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The thread lives on. A dead thread would upload nothing more, and the other ranks would wait for it."""
    save(1)
    mirror = Mirror(url, tmp_path, world, keep_last=2, timeout_s=30)
    failures = iter([OSError(errno.ESTALE, "Stale file handle")])

    def list_once_failing(run_folder: Path) -> list[Path]:
        if error := next(failures, None):
            raise error
        return list_checkpoints(run_folder)

    monkeypatch.setattr(mirror_module, "list_checkpoints", list_once_failing)
    mirror.start()
    mirror.request()
    (failed,) = wait_for_outcomes(mirror, 1)
    assert failed.problem and "Stale file handle" in failed.problem
    assert complete_steps(url) == [], "nothing is set aside or deleted"
    assert [(outcome.step, outcome.problem) for outcome in mirror.finish(lambda: None)] == [(1, None)]
    assert mirror._rounds._store.check(["end"])


def wait_for_outcomes(mirror: Mirror, count: int) -> list[UploadOutcome]:
    outcomes: list[UploadOutcome] = []
    deadline = time.monotonic() + 30
    while len(outcomes) < count:
        assert time.monotonic() < deadline
        outcomes += mirror.poll()
        time.sleep(0.01)
    return outcomes


def test_a_server_that_does_not_answer_ends_the_wait_of_the_run(
    save: Save, upload: Upload, monkeypatch: pytest.MonkeyPatch
) -> None:
    released = threading.Event()
    monkeypatch.setattr(MemoryFileSystem, "put_file", lambda *_: released.wait(30))
    save(1)
    outcomes = upload(timeout_s=0.5)
    released.set()
    assert [(outcome.action, outcome.problem) for outcome in outcomes] == [
        ("upload step 1 to", "it took longer than checkpoint.remote_timeout_s 0.5")
    ]


def test_a_checkpoint_that_is_being_uploaded_is_not_deleted(
    tmp_path: Path, world: World, backend: DdpBackend, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Saving does not wait for the upload either."""
    released, started = threading.Event(), threading.Event()
    put = MemoryFileSystem.put_file

    def put_slowly(*arguments: Any, **options: Any) -> None:
        started.set()
        assert released.wait(30)
        put(*arguments, **options)

    monkeypatch.setattr(MemoryFileSystem, "put_file", put_slowly)
    mirror = Mirror(url, tmp_path, world, keep_last=1, timeout_s=30)
    mirror.start()
    saver = BackgroundSaver(tmp_path, {}, backend, world, keep_last=1, asynchronous=False, mirror=mirror)
    saver.start(state_of(backend, 1))
    assert started.wait(30)
    for step in (2, 3):
        saver.start(state_of(backend, step))
    assert [step_of(folder) for folder in list_checkpoints(tmp_path)] == [1, 3]
    released.set()
    assert [(outcome.step, outcome.problem) for outcome in mirror.finish(lambda: None)] == [(1, None), (3, None)]
    assert complete_steps(url) == [3]


def test_checkpoints_of_later_steps_are_set_aside(save: Save, upload: Upload, url: str, tmp_path: Path) -> None:
    """The run continues from step 1, although the URL has step 2 already, and reaches step 2 again."""
    save(1)
    abandoned = save(2)
    upload()
    shutil.rmtree(abandoned)
    upload()
    assert complete_steps(url) == [1]
    assert ABANDONED_MANIFEST in stored()["step_00000002"]
    save(2)
    upload()
    assert complete_steps(url) == [1, 2]


def test_a_url_of_another_run_is_not_touched(save: Save, upload: Upload, tmp_path: Path, url: str) -> None:
    save(1)
    upload()
    assert is_paired(tmp_path, f"{url}/")
    (tmp_path / "remote.json").unlink()  # this makes it another run
    before = stored()
    save(2)
    (outcome,) = upload()
    assert outcome.problem and "already holds checkpoints of another run (steps 1)" in outcome.problem
    assert stored() == before


def test_abandoned_checkpoints_are_set_aside_when_the_server_answers_again(
    save: Save, upload: Upload, url: str, tmp_path: Path
) -> None:
    """The run went back to step 1 while the server was away, and has saved step 4 since then."""
    for step in (1, 2, 3):
        save(step)
    upload(keep_last=9)
    for step in (2, 3):
        shutil.rmtree(checkpoint_folder(tmp_path, step))
    abandon(tmp_path, 2)
    save(4)
    upload(keep_last=9)
    assert complete_steps(url) == [1, 4]
    assert not is_abandoned(tmp_path, url, 4)


def test_a_step_that_is_saved_again_is_uploaded_again(
    tmp_path: Path, world: World, save: Save, backend: DdpBackend, url: str
) -> None:
    """The run has rolled back after a spike, and reaches the same step with other weights."""
    mirror = Mirror(url, tmp_path, world, keep_last=2, timeout_s=30)
    mirror.start()
    manifests = []
    for _ in range(2):
        train_steps(backend, 1)
        manifests.append((save(1) / MANIFEST).read_bytes())
        mirror.request()
        wait_for_outcomes(mirror, 1)
        assert RemoteRun(url).open(1, {}).manifest_bytes == manifests[-1]
    assert manifests[0] != manifests[1]
    mirror.finish(lambda: None)


@pytest.fixture
def refused_steps(monkeypatch: pytest.MonkeyPatch) -> set[int]:
    """Return the steps whose files the server refuses. The set is empty at first."""
    steps: set[int] = set()
    put = MemoryFileSystem.put_file

    def put_file(self: Any, lpath: str, rpath: str, *arguments: Any, **options: Any) -> None:
        if any(f"step_{step:08d}" in rpath for step in steps):
            raise PermissionError("Access Denied")
        put(self, lpath, rpath, *arguments, **options)

    monkeypatch.setattr(MemoryFileSystem, "put_file", put_file)
    return steps


def test_a_checkpoint_that_fails_does_not_stop_the_others(
    save: Save, upload: Upload, url: str, refused_steps: set[int], tmp_path: Path
) -> None:
    """Old checkpoints are deleted, and the metrics are uploaded, although the newest upload always fails."""
    for step in (1, 2, 3):
        save(step)
    refused_steps.add(2)
    assert [(outcome.step, outcome.problem is None) for outcome in upload(keep_last=9)] == [
        (3, True),
        (2, False),
        (1, True),
    ]
    save(4)
    refused_steps.symmetric_difference_update({2, 4})
    (tmp_path / "metrics.jsonl").write_text('{"step": 4}\n')
    assert [(outcome.step, outcome.problem is None) for outcome in upload(keep_last=2)] == [(4, False), (2, True)]
    assert complete_steps(url) == [2, 3]
    assert RemoteRun(url).read_metrics() == b'{"step": 4}\n'


def test_a_new_checkpoint_is_uploaded_before_older_ones(
    tmp_path: Path, world: World, save: Save, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A new checkpoint is saved while the first of two older ones is uploaded."""
    for step in (1, 2):
        save(step)
    mirror = Mirror(url, tmp_path, world, keep_last=9, timeout_s=30)
    put = MemoryFileSystem.put_file

    def put_file(*arguments: Any, **options: Any) -> None:
        if not checkpoint_folder(tmp_path, 3).exists():
            save(3)
            mirror.request()
        put(*arguments, **options)

    monkeypatch.setattr(MemoryFileSystem, "put_file", put_file)
    mirror.start()
    mirror.request()
    assert [outcome.step for outcome in wait_for_outcomes(mirror, 3)] == [2, 3, 1]
    mirror.finish(lambda: None)


class TestTwoRanks:
    """Each rank uploads the files that it has written, from its own disk. The manifest waits for all ranks."""

    @pytest.fixture
    def folders(self, save: Save, tmp_path: Path) -> list[Path]:
        """Return the run folders of two ranks, each with only the files that this rank has written."""
        folder = save(1)
        other = folder / MOMENTS.replace("00000", "00001")
        (folder / MOMENTS).rename(other)
        seal(folder)
        elsewhere = checkpoint_folder(tmp_path / "rank_1", 1)
        elsewhere.mkdir(parents=True)
        other.rename(elsewhere / other.name)
        return [tmp_path, tmp_path / "rank_1"]

    def upload(self, url: str, folders: list[Path], timeout_s: float = 30.0) -> list[UploadOutcome]:
        store, device = HashStore(), torch.device("cpu")
        worlds = [World(rank, 2, rank, device, store) for rank in range(len(folders))]
        mirrors = [
            Mirror(url, folder, world, keep_last=2, timeout_s=timeout_s)
            for world, folder in zip(worlds, folders, strict=True)
        ]
        for mirror in mirrors:
            mirror.start()
        return [outcome for mirror in mirrors for outcome in mirror.finish(lambda: None)]

    def test_no_shared_disk_is_needed(self, url: str, folders: list[Path]) -> None:
        assert [(outcome.step, outcome.problem) for outcome in self.upload(url, folders)] == [(1, None)]
        assert len(stored()["step_00000001"]) == 4
        assert complete_steps(url) == [1]

    def test_a_file_that_a_rank_sees_later(self, url: str, folders: list[Path]) -> None:
        checkpoint = checkpoint_folder(folders[1], 1)
        hidden = checkpoint.rename(checkpoint.with_name("hidden"))
        threading.Timer(1.0, hidden.rename, [checkpoint]).start()
        assert [(outcome.step, outcome.problem) for outcome in self.upload(url, folders)] == [(1, None)]

    def test_a_rank_that_fails(self, url: str, folders: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(mirror_module, "_VISIBLE_S", 0.0)
        shutil.rmtree(folders[1])
        (outcome,) = self.upload(url, folders)
        assert outcome.problem and outcome.problem.startswith("rank 1: ")
        assert complete_steps(url) == []

    def test_a_rank_that_waits_asks_less_and_less_often(
        self, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The pauses begin at half a second, also after a save, and grow to ten seconds, or to one at the end."""
        world = World(1, 2, 1, torch.device("cpu"), HashStore())
        mirror = Mirror(url, tmp_path, world, keep_last=2, timeout_s=30.0)
        pauses: list[float] = []

        def wait(pause_s: float) -> bool:
            pauses.append(pause_s)
            if len(pauses) == 40:
                mirror._ending.set()
            if len(pauses) == 44:
                UploadRounds(replace(world, rank=0), 30.0).end()
            return len(pauses) == 20  # a save

        monkeypatch.setattr(mirror._due, "wait", wait)
        mirror._follow()
        for begin in (0, 20):
            assert pauses[begin : begin + 2] == [0.5, 0.625]
            assert pauses[begin : begin + 20] == sorted(pauses[begin : begin + 20])
        assert pauses[39] == 10.0 and set(pauses[40:]) == {1.0}

    def test_a_rank_that_does_not_answer(self, url: str, folders: list[Path]) -> None:
        outcomes = self.upload(url, folders[:1], timeout_s=1.0)
        assert outcomes and all(outcome.problem for outcome in outcomes)
        assert complete_steps(url) == []
