"""A background save writes the state at its start, one checkpoint at a time, while training continues."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.backends.ddp import DdpBackend
from pipeline.checkpoint import background, saving
from pipeline.checkpoint.background import BackgroundSaver, SnapshotTaker
from pipeline.checkpoint.layout import checkpoint_folder, list_checkpoints
from pipeline.checkpoint.loading import load_training_state
from pipeline.checkpoint.pieces import piece_key
from pipeline.checkpoint.verification import find_damage
from pipeline.distributed.world import World
from pipeline.hardware.pinned_buffers import allocate_host_buffers
from tests.pipeline.checkpoint.conftest import (
    WEIGHTS,
    contents,
    make_backend,
    state_of,
    train_steps,
    updates_of,
)
from tests.pipeline.conftest import assert_same, largest_file

MakeSaver = Callable[..., BackgroundSaver]


@pytest.fixture
def make_saver(tmp_path: Path, backend: DdpBackend, world: World) -> MakeSaver:
    def make(*, keep_last: int = 10, asynchronous: bool = True) -> BackgroundSaver:
        return BackgroundSaver(tmp_path, {}, backend, world, keep_last=keep_last, asynchronous=asynchronous)

    return make


class SlowDisk:
    """Blocks every write until ``released`` is set, and counts concurrent writes."""

    def __init__(self) -> None:
        self.released = threading.Event()
        self.started: list[int] = []
        self.max_concurrent = 0
        self._now = 0
        self._lock = threading.Lock()
        self._write = background.write_checkpoint

    def write(self, run_folder: Path, snapshot: Any, *rest: Any) -> Any:
        with self._lock:
            self.started.append(snapshot.state.step)
            self._now += 1
            self.max_concurrent = max(self.max_concurrent, self._now)
        assert self.released.wait(30)
        try:
            return self._write(run_folder, snapshot, *rest)
        finally:
            with self._lock:
                self._now -= 1


@pytest.fixture
def slow_disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[SlowDisk]:
    disk = SlowDisk()
    monkeypatch.setattr(background, "write_checkpoint", disk.write)
    yield disk
    disk.released.set()


@pytest.mark.gpu
def test_a_snapshot_of_a_gpu_is_in_pinned_memory(gpu: torch.device) -> None:
    """The next steps do not change it, although the device has queued them already."""
    on_gpu = World(0, 1, 0, gpu)
    trained = make_backend(on_gpu, seed=1, run={"device": gpu.type})
    train_steps(trained, 3)
    taker, before = SnapshotTaker(trained, on_gpu), contents(trained)
    taker.take(state_of(trained, 3))
    train_steps(trained, 3, first_seed=50)
    buffers = taker._buffers
    assert len(buffers) == len(before)
    assert all(buffer.is_pinned() for buffer in buffers.values())
    for fragment in trained.fragments():
        for kind in fragment.tensors:
            copied = buffers[piece_key(kind, fragment.name, None)]
            assert torch.equal(copied.view(-1), before[f"{fragment.name} {kind}"].view(-1)), fragment.name


class TestWhatIsSaved:
    @pytest.mark.parametrize("precision", ["fp32", "amp_fp16"])
    def test_it_is_the_state_at_the_start_although_training_continues(
        self, tmp_path: Path, world: World, slow_disk: SlowDisk, precision: str
    ) -> None:
        trained = make_backend(world, seed=1, run={"precision": precision})
        train_steps(trained, 3)
        saver = BackgroundSaver(tmp_path, {}, trained, world, keep_last=1, asynchronous=True)
        before, state = contents(trained), state_of(trained, 3)
        saver.start(state)
        train_steps(trained, 3, first_seed=50)
        slow_disk.released.set()
        (outcome,) = saver.wait()
        assert outcome.saved is not None and outcome.saved.folder == checkpoint_folder(tmp_path, 3)
        other = make_backend(world, seed=2, run={"precision": precision})
        assert load_training_state(outcome.saved.folder, other) == state
        assert_same(contents(other), before)
        assert updates_of(other) == 3
        assert not all(before[name].equal(tensor) for name, tensor in contents(trained).items())

    def test_each_save_has_its_own_state(self, make_saver: MakeSaver, backend: DdpBackend, world: World) -> None:
        """All snapshots are copied into the same buffers."""
        saver, moments = make_saver(), []
        for step in (4, 5, 6):
            train_steps(backend, 1, first_seed=step)
            moments.append((state_of(backend, step), contents(backend)))
            saver.start(moments[-1][0])
        saver.wait()
        for state, expected in moments:
            other = make_backend(world, seed=2)
            assert load_training_state(checkpoint_folder(saver.run_folder, state.step), other) == state
            assert_same(contents(other), expected)

    def test_it_writes_the_same_files_as_a_synchronous_save(self, make_saver: MakeSaver, backend: DdpBackend) -> None:
        files = []
        for asynchronous in (True, False):
            saver = make_saver(asynchronous=asynchronous)
            saver.start(state_of(backend, 3 + asynchronous))
            (outcome,) = saver.wait()
            assert outcome.saved is not None
            files.append([path.read_bytes() for path in sorted(outcome.saved.folder.glob("*.safetensors"))])
        assert files[0] == files[1] and len(files[0]) == 2

    def test_older_checkpoints_are_deleted(self, make_saver: MakeSaver, backend: DdpBackend) -> None:
        saver = make_saver(keep_last=2)
        for step in (1, 2, 3, 4):
            saver.start(state_of(backend, step))
        saver.wait()
        assert [folder.name for folder in list_checkpoints(saver.run_folder)] == ["step_00000003", "step_00000004"]


class TestBuffers:
    def test_they_are_reused_and_do_not_share_memory_with_the_model(self, backend: DdpBackend, world: World) -> None:
        taker = SnapshotTaker(backend, world)
        first, second = taker.take(state_of(backend, 1)), taker.take(state_of(backend, 2))
        places = [
            {
                (group, key): tensor.read().data_ptr()
                for group, tensors in taken.groups.items()
                for key, tensor in tensors.items()
            }
            for taken in (first, second)
        ]
        assert places[0] == places[1]
        assert len(set(places[0].values())) == len(places[0]) == 3 * len(backend.parameter_shapes)
        in_use = {tensor.data_ptr() for fragment in backend.fragments() for tensor in fragment.tensors.values()}
        assert not in_use & set(places[0].values())

    def test_they_are_allocated_once(self, backend: DdpBackend, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
        requests: list[int] = []

        def allocate(sources: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            requests.append(len(sources))
            return allocate_host_buffers(sources)

        monkeypatch.setattr(background, "allocate_host_buffers", allocate)
        taker = SnapshotTaker(backend, world)
        for step in (1, 2, 3):
            taker.take(state_of(backend, step))
        assert requests == [3 * len(backend.fragments())]


class TestOneAtATime:
    def test_the_next_start_waits_for_the_one_in_flight(
        self, make_saver: MakeSaver, backend: DdpBackend, slow_disk: SlowDisk
    ) -> None:
        saver = make_saver()
        assert saver.start(state_of(backend, 1)) == []
        with ThreadPoolExecutor(1) as training:
            second = training.submit(saver.start, state_of(backend, 2))
            assert wait([second], timeout=0.2).not_done
            assert slow_disk.started == [1]
            slow_disk.released.set()
            (outcome,) = second.result(timeout=30)
        assert outcome.step == 1 and outcome.saved is not None and find_damage(outcome.saved.folder) is None
        (outcome,) = saver.wait()
        assert outcome.step == 2
        assert outcome.pause_s >= 0.2, "the wait for the previous save is part of the pause"
        assert slow_disk.started == [1, 2]
        assert slow_disk.max_concurrent == 1

    def test_poll_never_waits_and_gives_an_outcome_once(
        self, make_saver: MakeSaver, backend: DdpBackend, slow_disk: SlowDisk
    ) -> None:
        saver = make_saver()
        assert saver.poll() == [] and saver.last_step is None
        saver.start(state_of(backend, 1))
        assert saver.last_step == 1
        assert saver.poll() == saver.poll() == []
        assert list_checkpoints(saver.run_folder) == []
        slow_disk.released.set()
        outcomes = saver.poll()
        for _ in range(3000):
            if outcomes:
                break
            threading.Event().wait(0.01)
            outcomes = saver.poll()
        assert [(outcome.step, outcome.problem) for outcome in outcomes] == [(1, None)]
        assert saver.poll() == saver.wait() == []

    def test_without_a_save_there_is_nothing_to_wait_for(self, make_saver: MakeSaver) -> None:
        assert make_saver().wait() == []


class TestSynchronous:
    def test_the_checkpoint_is_complete_when_start_returns(self, make_saver: MakeSaver, backend: DdpBackend) -> None:
        saver = make_saver(asynchronous=False)
        for step in (1, 2):
            saver.start(state_of(backend, step))
            assert find_damage(checkpoint_folder(saver.run_folder, step)) is None
            (outcome,) = saver.poll()
            assert (outcome.step, outcome.problem) == (step, None)
            assert outcome.saved is not None and outcome.pause_s >= outcome.saved.seconds

    def test_a_failure_is_an_outcome_too(self, make_saver: MakeSaver, backend: DdpBackend) -> None:
        saver = make_saver(asynchronous=False)
        with largest_file(100):
            assert saver.start(state_of(backend, 1)) == []
        (outcome,) = saver.poll()
        assert outcome.saved is None and "step_00000001" in str(outcome.problem)


class TestFailure:
    @pytest.mark.parametrize("asked", ["wait", "the next start"])
    def test_a_failed_save_is_reported_and_later_ones_work(
        self, make_saver: MakeSaver, backend: DdpBackend, asked: str
    ) -> None:
        saver = make_saver(keep_last=1)
        saver.start(state_of(backend, 1))
        saver.wait()
        with largest_file(20_000):
            saver.start(state_of(backend, 2))
            if asked == "wait":
                (failed,) = saver.wait()
            else:
                (failed,) = saver.start(state_of(backend, 3))
                saver.wait()
        assert (failed.step, failed.saved) == (2, None)
        assert failed.problem is not None and "\n" not in failed.problem
        assert failed.problem.startswith(f"cannot save {checkpoint_folder(saver.run_folder, 2)}: rank 0: ")
        assert [folder.name for folder in (saver.run_folder / "checkpoints").iterdir()] == ["step_00000001"]

        train_steps(backend, 1, first_seed=9)
        saver.start(state_of(backend, 4))
        (outcome,) = saver.wait()
        assert (outcome.step, outcome.problem) == (4, None)
        assert outcome.saved is not None and find_damage(outcome.saved.folder) is None
        assert list_checkpoints(saver.run_folder) == [outcome.saved.folder]

    @pytest.mark.parametrize("error", [MemoryError(), RuntimeError("one line\nand more")], ids=repr)
    def test_an_unexpected_error_does_not_end_the_training(
        self,
        make_saver: MakeSaver,
        backend: DdpBackend,
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
        error: Exception,
    ) -> None:
        """Otherwise, this rank would die, while the others count a failed save. The log has the traceback."""

        def fail(*_: Any) -> None:
            raise error

        saver = make_saver()
        with monkeypatch.context() as patch:
            patch.setattr(saving, "write_tensors", fail)
            saver.start(state_of(backend, 1))
            (failed,) = saver.wait()
        assert failed.saved is None and failed.problem is not None and "\n" not in failed.problem
        folder = checkpoint_folder(saver.run_folder, 1)
        assert failed.problem.startswith(f"cannot save {folder}: rank 0: {type(error).__name__}")
        assert "rank 0: an unexpected error in a checkpoint" in caplog.text and "Traceback" in caplog.text
        saver.start(state_of(backend, 2))
        assert [outcome.problem for outcome in saver.wait()] == [None]


def test_an_outcome_says_what_was_written(make_saver: MakeSaver, backend: DdpBackend) -> None:
    saver = make_saver()
    saver.start(state_of(backend, 3))
    (outcome,) = saver.wait()
    assert outcome.saved is not None
    written = sum(path.stat().st_size for path in outcome.saved.folder.glob("*.safetensors"))
    assert outcome.saved.bytes_of_rank == {0: written}
    assert outcome.saved.total_bytes == written > (outcome.saved.folder / WEIGHTS).stat().st_size
    line = str(outcome.saved)
    assert line.startswith(f"saved {outcome.saved.folder} in ") and "\n" not in line
    assert f"rank 0 {written / 1e6:.1f} MB" in line
