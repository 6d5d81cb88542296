"""Reading ahead changes nothing but the time that a step waits."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from data_tools.errors import DataError
from data_tools.shards import open_split
from pipeline.data.batch_plan import BatchPlan
from pipeline.data.datasets import TokenDataset
from pipeline.data.loader import MicroBatch, TrainLoader
from pipeline.data.prefetch import Prefetcher
from tests.pipeline.conftest import write_shards

CPU = torch.device("cpu")
PLAN = BatchPlan(2, 5, 2, 1)  # 4 samples a step


class WatchedLoader(TrainLoader):
    """Notes what is read and where, and can be made to fail."""

    def __init__(self, folder: Path) -> None:
        super().__init__([TokenDataset("only", str(folder), 1.0, open_split(folder, "train"), None)], PLAN, 7, 0)
        self.reads: list[tuple[int, bool]] = []  # samples consumed, whether the training thread read
        self.broken_from: int | None = None

    def micro_batches(self, consumed: int) -> list[MicroBatch]:
        self.reads.append((consumed, threading.current_thread() is threading.main_thread()))
        if self.broken_from is not None and consumed >= self.broken_from:
            raise DataError(f"cannot read the samples after {consumed}")
        return super().micro_batches(consumed)


@pytest.fixture
def loader(tmp_path: Path) -> WatchedLoader:
    return WatchedLoader(write_shards(tmp_path / "data", {"train": [np.arange(331) % 80]}))


def tokens_of(batches: list[MicroBatch]) -> list[list[list[int]]]:
    return [batch.tokens.tolist() for batch in batches]


def prefetch_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("prefetch")]


def settle(prefetcher: Prefetcher) -> None:
    """Wait until what is read ahead is there."""
    assert prefetcher._ahead is not None
    prefetcher._ahead[1].exception()


def test_batches_are_those_of_the_loader_whatever_is_asked(loader: WatchedLoader) -> None:
    prefetcher = Prefetcher(loader, CPU)
    for consumed in (0, 4, 8, 40, 44, 8, 12, 12, 0):  # on, a jump, back as after a rollback, the same again
        expected = TrainLoader.micro_batches(loader, consumed)
        assert tokens_of(prefetcher.micro_batches(consumed)) == tokens_of(expected)
    prefetcher.close()


def test_one_step_is_read_ahead_and_only_one(loader: WatchedLoader) -> None:
    prefetcher = Prefetcher(loader, CPU)
    assert loader.reads == []
    prefetcher.micro_batches(20)
    settle(prefetcher)
    assert loader.reads == [(20, True), (24, False)]
    prefetcher.micro_batches(24)
    settle(prefetcher)
    assert loader.reads == [(20, True), (24, False), (28, False)]
    prefetcher.micro_batches(100)  # a jump
    settle(prefetcher)
    assert loader.reads[3:] == [(100, True), (104, False)]
    prefetcher.close()


def test_what_goes_wrong_reading_ahead_is_told_when_it_is_asked_for(loader: WatchedLoader) -> None:
    loader.broken_from = 8
    prefetcher = Prefetcher(loader, CPU)
    prefetcher.micro_batches(0)
    prefetcher.micro_batches(4)
    settle(prefetcher)
    with pytest.raises(DataError, match="cannot read the samples after 8"):
        prefetcher.micro_batches(8)
    prefetcher.close()


def test_what_nobody_asks_for_may_be_broken(loader: WatchedLoader) -> None:
    """A step that a rollback leaves out, or the one after the last."""
    loader.broken_from = 8
    prefetcher = Prefetcher(loader, CPU)
    prefetcher.micro_batches(4)
    settle(prefetcher)
    assert tokens_of(prefetcher.micro_batches(0)) == tokens_of(TrainLoader.micro_batches(loader, 0))
    prefetcher.close()


def test_no_thread_is_left(loader: WatchedLoader) -> None:
    prefetcher = Prefetcher(loader, CPU)
    assert prefetch_threads() == []
    prefetcher.micro_batches(0)
    assert len(prefetch_threads()) == 1
    prefetcher.micro_batches(400)
    assert len(prefetch_threads()) == 1
    prefetcher.close()
    assert prefetch_threads() == []
    Prefetcher(loader, CPU).close()  # one that was never used


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_for_a_gpu_the_batches_wait_in_page_locked_memory(loader: WatchedLoader) -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    prefetcher = Prefetcher(loader, device)
    for consumed in range(0, 80, 4):
        expected = TrainLoader.micro_batches(loader, consumed)
        batches = prefetcher.micro_batches(consumed)
        assert all(batch.tokens.is_pinned() for batch in batches)
        for batch, plain in zip(batches, expected, strict=True):
            assert [part.tolist() for part in batch.to(device)] == [part.tolist() for part in plain.to(CPU)]
    prefetcher.close()
