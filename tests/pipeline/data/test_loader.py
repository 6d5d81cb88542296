"""Tokens of a step under any ranks, mixtures and reading ahead; every validation target once."""

from __future__ import annotations

import threading
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from data_tools.errors import DataError
from data_tools.shards.reader import TokenStream, open_split
from pipeline.data.batch_plan import BatchPlan
from pipeline.data.datasets import TokenDataset
from pipeline.data.loader import MicroBatch, Prefetcher, TrainLoader, scored_targets, validation_batches
from pipeline.data.sample_order import SampleOrder
from pipeline.errors import TrainingError
from pipeline.model.output_layer import IGNORE_INDEX
from tests.pipeline.conftest import VOCAB_SIZE, write_shards

T = 5
TRAIN_TOKENS = 331  # 66 windows
CPU = torch.device("cpu")
MIXTURE_T = 4


def numbered(count: int) -> np.ndarray:
    """Return tokens that identify their place in the stream: no two ranges of three tokens are equal."""
    numbers = np.arange(count)
    return np.where(numbers % 2 == 0, numbers // 2 % 80, numbers // 160)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tokens = numbered(TRAIN_TOKENS)
    return write_shards(
        tmp_path / "data", {"train": [tokens[:47], tokens[47:50], tokens[50:]], "val": [numbered(83)[:13]]}
    )


@pytest.fixture
def train(folder: Path) -> TokenStream:
    return open_split(folder, "train")


def validation_stream(tmp_path: Path, tokens: int) -> TokenStream:
    return open_split(write_shards(tmp_path / f"val_{tokens}", {"val": [numbered(tokens)]}), "val")


def loader_of(stream: TokenStream, plan: BatchPlan, seed: int, rank: int) -> TrainLoader:
    """Return a loader of one dataset."""
    return TrainLoader([TokenDataset("only", "unused", 1.0, stream, None)], plan, seed, rank)


def bytes_of(batch: MicroBatch) -> bytes:
    return batch.tokens.numpy().tobytes()


def step_of_all_ranks(train: TokenStream, world_size: int, consumed: int, samples_per_step: int = 8) -> list[bytes]:
    """Return the micro-batches of a step, in the order of their samples."""
    plan = BatchPlan(2, T, samples_per_step // 2 // world_size, world_size)
    batches: list[MicroBatch] = []
    for rank in range(world_size):
        mine = loader_of(train, plan, 7, rank).micro_batches(consumed)
        assert len(mine) == plan.accumulation
        batches += mine
    return [bytes_of(batch) for batch in sorted(batches, key=lambda batch: batch.first_sample)]


class TestTraining:
    def test_a_step_is_the_same_at_every_world_size(self, train: TokenStream) -> None:
        for consumed in (0, 8, 64, 800):  # the third reaches into the second epoch
            alone = step_of_all_ranks(train, 1, consumed)
            assert len(alone) == 4
            assert step_of_all_ranks(train, 2, consumed) == alone
            assert step_of_all_ranks(train, 4, consumed) == alone

    def test_ranks_share_no_samples(self, train: TokenStream) -> None:
        plan = BatchPlan(2, T, 3, 4)
        firsts = [b.first_sample for rank in range(4) for b in loader_of(train, plan, 7, rank).micro_batches(0)]
        assert sorted(firsts) == list(range(0, 24, 2))

    def test_the_samples_of_a_step_do_not_depend_on_the_micro_batch(self, train: TokenStream) -> None:
        def samples(micro_batch_size: int) -> list[bytes]:
            plan = BatchPlan(micro_batch_size, T, 8 // micro_batch_size, 1)
            batches = loader_of(train, plan, 7, 0).micro_batches(16)
            return [row.numpy().tobytes() for batch in batches for row in batch.tokens]

        assert samples(1) == samples(2) == samples(4) == samples(8)

    def test_the_number_of_consumed_samples_is_all_that_a_resume_needs(self, train: TokenStream) -> None:
        plan = BatchPlan(2, T, 2, 1)
        running = loader_of(train, plan, 7, 0)
        steps = [running.micro_batches(consumed) for consumed in range(0, 400, 4)]
        fresh = loader_of(train, plan, 7, 0).micro_batches(200)
        assert [bytes_of(b) for b in fresh] == [bytes_of(b) for b in steps[50]]

    def test_an_epoch_is_every_window_once(self, train: TokenStream) -> None:
        plan = BatchPlan(2, T, 3, 1)  # 11 steps of 6 samples: 66 windows
        loader = loader_of(train, plan, 7, 0)
        for start in (0, 66):
            rows = [row for step in range(11) for b in loader.micro_batches(start + step * 6) for row in b.tokens]
            windows = [numbered(TRAIN_TOKENS)[at * T : at * T + T + 1].tolist() for at in range(66)]
            assert sorted(row.tolist() for row in rows) == sorted(windows)

    def test_a_window_without_its_last_target_is_left_out(self, tmp_path: Path) -> None:
        exact = open_split(write_shards(tmp_path / "exact", {"train": [numbered(6 * T)]}), "train")
        loader = loader_of(exact, BatchPlan(1, T, 5, 1), 7, 0)  # the sixth window would lack a token
        starts = {batch.tokens[0, :2].numpy().tobytes() for batch in loader.micro_batches(0)}
        assert len(starts) == 5
        with pytest.raises(TrainingError, match="30 tokens = 5 samples"):
            loader_of(exact, BatchPlan(1, T, 6, 1), 7, 0)

    def test_windows_do_not_depend_on_the_size_of_shards(self, train: TokenStream, tmp_path: Path) -> None:
        whole = open_split(write_shards(tmp_path / "whole", {"train": [numbered(TRAIN_TOKENS)]}), "train")
        assert step_of_all_ranks(whole, 1, 24) == step_of_all_ranks(train, 1, 24)

    def test_another_seed_another_order(self, train: TokenStream) -> None:
        plan = BatchPlan(2, T, 4, 1)
        first, second = (loader_of(train, plan, seed, 0).micro_batches(0) for seed in (1, 2))
        assert [bytes_of(b) for b in first] != [bytes_of(b) for b in second]

    def test_too_little_data_for_one_step(self, folder: Path) -> None:
        val = open_split(folder, "val")  # 13 tokens: 2 windows
        assert loader_of(val, BatchPlan(2, T, 1, 1), 7, 0).micro_batches(0)[0].tokens.shape == (2, T + 1)
        message = r"13 tokens = 2 samples of 5 .* the 3 of one step; .* to 10 and batch.micro_batch_size to 2,"
        with pytest.raises(TrainingError, match=message):
            loader_of(val, BatchPlan(3, T, 1, 1), 7, 0)


class TestMixture:
    """Three datasets with different tokens: 10 to 19, 20 to 29, 30 to 39."""

    WEIGHTS = (0.5, 0.3, 0.2)
    WINDOWS = (11, 30, 7)

    @pytest.fixture
    def datasets(self, tmp_path: Path) -> list[TokenDataset]:
        made = []
        for index, (weight, windows) in enumerate(zip(self.WEIGHTS, self.WINDOWS, strict=True)):
            # The first two tokens of a window name it.
            tokens = np.full((windows, MIXTURE_T), 10 * (index + 1))
            tokens[:, 0] += np.arange(windows) % 10
            tokens[:, 1] += np.arange(windows) // 10
            folder = write_shards(tmp_path / f"data_{index}", {"train": [np.append(tokens, 0)]})
            made.append(TokenDataset(f"data_{index}", str(folder), weight, open_split(folder, "train"), None))
        return made

    @staticmethod
    def step(datasets: list[TokenDataset], world_size: int, consumed: int, seed: int = 7) -> list[MicroBatch]:
        """Return the micro-batches of 8 samples over all ranks, in the order of their samples."""
        plan = BatchPlan(2, MIXTURE_T, 4 // world_size, world_size)
        batches = [
            batch
            for rank in range(world_size)
            for batch in TrainLoader(datasets, plan, seed, rank).micro_batches(consumed)
        ]
        return sorted(batches, key=lambda batch: batch.first_sample)

    @staticmethod
    def windows_of(batches: list[MicroBatch]) -> list[tuple[int, int]]:
        """Return the dataset and window of each sample."""
        rows = [row for batch in batches for row in batch.tokens.tolist()]
        return [(row[0] // 10 - 1, row[0] % 10 + row[1] % 10 * 10) for row in rows]

    @pytest.mark.parametrize("consumed", [0, 8, 64, 8 * 10**9])
    def test_a_step_is_the_same_at_every_world_size(self, datasets: list[TokenDataset], consumed: int) -> None:
        alone = [batch.tokens.tolist() for batch in self.step(datasets, 1, consumed)]
        assert [batch.tokens.tolist() for batch in self.step(datasets, 2, consumed)] == alone
        assert [batch.tokens.tolist() for batch in self.step(datasets, 4, consumed)] == alone

    def test_each_data_set_is_read_epoch_by_epoch(self, datasets: list[TokenDataset]) -> None:
        samples = self.windows_of([batch for at in range(0, 400, 8) for batch in self.step(datasets, 1, at)])
        assert Counter(index for index, _ in samples) == Counter({0: 200, 1: 120, 2: 80})
        for index, windows in enumerate(self.WINDOWS):
            own = [window for dataset, window in samples if dataset == index]
            epochs = [own[at : at + windows] for at in range(0, len(own) - windows + 1, windows)]
            assert len(epochs) >= 4
            assert all(sorted(epoch) == list(range(windows)) for epoch in epochs)
            assert len({tuple(epoch) for epoch in epochs}) == len(epochs), "every epoch has its own order"

    def test_seeds_differ_and_repeat(self, datasets: list[TokenDataset]) -> None:
        first, again, other = (self.windows_of(self.step(datasets, 1, 16, seed)) for seed in (1, 1, 2))
        assert first == again != other
        assert [index for index, _ in first] == [index for index, _ in other]

    def test_a_mixture_of_one_is_that_data_set(self, datasets: list[TokenDataset]) -> None:
        order = SampleOrder(self.WINDOWS[1], 7)
        expected = order.windows(np.arange(16, 24, dtype=np.int64)).tolist()
        assert self.windows_of(self.step(datasets[1:2], 1, 16)) == [(1, window) for window in expected]

    @pytest.mark.parametrize("at_once", [1, 3 * MIXTURE_T, 10**6])
    def test_scored_targets_are_counted_by_window(
        self, tmp_path: Path, at_once: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("pipeline.data.loader.COUNTED_AT_ONCE", at_once)
        mask = np.random.default_rng(0).random(10 * MIXTURE_T + 3) < 0.3
        shards = np.split(np.full(mask.size, 50), [30])
        folder = write_shards(tmp_path / "masked", {"val": shards}, masks={"val": np.split(mask, [30])})
        targets = mask[1:]
        expected = [int(targets[at : at + MIXTURE_T].sum()) for at in range(0, targets.size, MIXTURE_T)]
        assert scored_targets(open_split(folder, "val"), MIXTURE_T).tolist() == expected

    def test_a_data_set_without_a_mask_is_scored_everywhere(self, datasets: list[TokenDataset], tmp_path: Path) -> None:
        tokens, mask = np.full(41, 50), np.arange(41) % MIXTURE_T == 0  # the last target of a window
        folder = write_shards(tmp_path / "masked", {"train": [tokens]}, masks={"train": [mask]})
        masked = TokenDataset("masked", str(folder), 1.0, open_split(folder, "train"), None)
        batches = self.step([*datasets, masked], 1, 0)
        for batch in batches:
            assert batch.target_mask is not None
            for row, scored in zip(batch.tokens.tolist(), batch.target_mask.tolist(), strict=True):
                assert scored == ([False, False, False, True] if row[0] == 50 else [True] * MIXTURE_T)
        assert {row[0] // 10 for batch in batches for row in batch.tokens.tolist()} >= {1, 2, 5}

    def test_a_data_set_that_is_too_small_for_its_share_is_refused(self, datasets: list[TokenDataset]) -> None:
        TrainLoader(datasets, BatchPlan(22, MIXTURE_T, 1, 1), 7, 0)  # 11, 6.6 and 4.4 samples per step
        message = (
            r"data\.mixture: the split 'train' of .*data_0 has 45 tokens = 11 samples of 4 tokens, fewer than the 12 "
            r"per step that its share of 50\.00% takes; lower its weight or batch\.tokens_per_step"
        )
        with pytest.raises(TrainingError, match=message) as caught:
            TrainLoader(datasets, BatchPlan(23, MIXTURE_T, 1, 1), 7, 0)
        assert "\n" not in str(caught.value)


class TestMicroBatch:
    TOKENS = torch.from_numpy(np.array([[1, 2, 3, 4], [5, 6, 7, 8]], dtype=np.uint16))

    def test_targets_are_the_inputs_one_token_further(self) -> None:
        inputs, targets = MicroBatch(0, self.TOKENS).to(CPU)
        assert inputs.tolist() == [[1, 2, 3], [5, 6, 7]]
        assert targets.tolist() == [[2, 3, 4], [6, 7, 8]]
        assert inputs.dtype == targets.dtype == torch.int64

    def test_targets_of_a_training_batch_are_the_next_tokens_of_the_text(self, train: TokenStream) -> None:
        (batch,) = loader_of(train, BatchPlan(4, T, 1, 1), 7, 0).micro_batches(0)
        inputs, targets = batch.to(CPU)
        text = numbered(TRAIN_TOKENS).tolist()
        for input_row, target_row in zip(inputs.tolist(), targets.tolist(), strict=True):
            (at,) = [at for at in range(0, 330, T) if text[at : at + T + 1] == [*input_row, target_row[-1]]]
            assert target_row == text[at + 1 : at + T + 1]

    def test_masked_targets_are_ignored_and_not_counted(self) -> None:
        mask = torch.tensor([[True, False, True], [False, False, False]])
        batch = MicroBatch(0, self.TOKENS, mask)
        inputs, targets = batch.to(CPU)
        assert inputs.tolist() == [[1, 2, 3], [5, 6, 7]]
        assert targets.tolist() == [[2, IGNORE_INDEX, 4], [IGNORE_INDEX] * 3]
        assert batch.scored_targets == 2
        assert MicroBatch(0, self.TOKENS).scored_targets == 6

    def test_large_ids_survive(self) -> None:
        inputs, _ = MicroBatch(0, torch.from_numpy(np.array([[50256, 65535, 40000]], dtype=np.uint16))).to(CPU)
        assert inputs.tolist() == [[50256, 65535]]

    @pytest.mark.gpu
    def test_pinned_memory_is_not_reused_before_it_is_copied(self, gpu: torch.device) -> None:
        """Copies wait in the queue of a busy GPU while later batches are pinned and earlier ones are freed."""
        a = torch.randn(4096, 4096, device=gpu)
        arrived = []
        for number in range(50):
            a = a @ a / 64
            batch = MicroBatch(0, torch.full((8, 1025), number).to(torch.uint16), torch.ones(8, 1024, dtype=torch.bool))
            arrived.append(batch.pinned().to(gpu))
        for number, (inputs, targets) in enumerate(arrived):
            assert (inputs == number).all() and (targets == number).all()


class TestMasks:
    """The mask of token t + 1 says whether the target at position t is scored."""

    TOKENS = 131  # 26 windows
    MASK = np.random.default_rng(3).random(TOKENS) < 0.4

    @pytest.fixture
    def masked(self, tmp_path: Path) -> Path:
        cuts = [40, 41, 90]
        return write_shards(
            tmp_path / "masked",
            {"train": np.split(numbered(self.TOKENS), cuts), "val": np.split(numbered(self.TOKENS), cuts)},
            masks={"train": np.split(self.MASK, cuts), "val": np.split(self.MASK, cuts)},
        )

    def scored_places(self, batch: MicroBatch) -> Counter[int]:
        """Return the places in the split of a batch's scored targets; check that all others are ignored."""
        text = numbered(self.TOKENS).tolist()
        inputs, targets = batch.to(CPU)
        places: Counter[int] = Counter()
        for row, input_row, target_row in zip(batch.tokens.tolist(), inputs.tolist(), targets.tolist(), strict=True):
            assert input_row == row[:-1]
            known = len([token for token in row if token]) if 0 in row[2:] else T + 1  # the last window is padded
            (at,) = [at for at in range(0, self.TOKENS - 1, T) if text[at : at + known] == row[:known]]
            for t, target in enumerate(target_row):
                assert target in (IGNORE_INDEX, row[t + 1])
                places.update([at + t + 1] if target != IGNORE_INDEX else [])
        assert batch.scored_targets == places.total()
        return places

    @pytest.mark.parametrize("world_size", [1, 2])
    def test_an_epoch_scores_each_marked_token_once(self, masked: Path, world_size: int) -> None:
        train = open_split(masked, "train")
        plan = BatchPlan(1, T, 13 // world_size + world_size - 1, world_size)  # 26 windows: 2 steps of 13, or of 14
        places: Counter[int] = Counter()
        for rank in range(world_size):
            loader = loader_of(train, plan, 7, rank)
            assert loader.has_mask
            for consumed in (0, plan.samples_per_step):
                for batch in loader.micro_batches(consumed):
                    if batch.first_sample < 26:
                        places += self.scored_places(batch)
        assert places == Counter(np.flatnonzero(self.MASK[1:]) + 1)

    def test_a_window_may_have_no_scored_target(self, tmp_path: Path) -> None:
        mask = np.zeros(self.TOKENS, dtype=np.bool_)
        mask[7] = True
        folder = write_shards(tmp_path / "one", {"train": [numbered(self.TOKENS)]}, masks={"train": [mask]})
        batches = loader_of(open_split(folder, "train"), BatchPlan(1, T, 26, 1), 7, 0).micro_batches(0)
        assert sorted(batch.scored_targets for batch in batches) == [0] * 25 + [1]

    @pytest.mark.parametrize("batch_size", [1, 4])
    def test_validation_scores_each_marked_token_once(self, masked: Path, batch_size: int) -> None:
        stream = open_split(masked, "val")
        places: Counter[int] = Counter()
        for rank in range(2):
            for batch in validation_batches(stream, T, batch_size, rank, 2):
                if batch.scored_targets:
                    places += self.scored_places(
                        MicroBatch(0, batch.tokens[: self._filled(batch)], batch.target_mask[: self._filled(batch)])
                    )
        assert places == Counter(np.flatnonzero(self.MASK[1:]) + 1)

    @staticmethod
    def _filled(batch: MicroBatch) -> int:
        return int((batch.tokens.int().sum(dim=1) > 0).sum())

    def test_without_a_mask_all_targets_are_scored(self, train: TokenStream) -> None:
        loader = loader_of(train, BatchPlan(2, T, 1, 1), 7, 0)
        assert not loader.has_mask
        assert loader.micro_batches(0)[0].target_mask is None


class TestValidation:
    @pytest.mark.parametrize("world_size", [1, 2, 3, 4])
    @pytest.mark.parametrize("batch_size", [1, 2, 7])
    @pytest.mark.parametrize("tokens", [2, 6, 51, 52, 53, 83])  # the last window is whole, or lacks some targets
    def test_every_target_once_over_all_ranks(
        self, tmp_path: Path, tokens: int, batch_size: int, world_size: int
    ) -> None:
        stream = validation_stream(tmp_path, tokens)
        of_rank = [list(validation_batches(stream, T, batch_size, rank, world_size)) for rank in range(world_size)]
        assert len({len(batches) for batches in of_rank}) == 1, "every rank must run the same number of forward passes"
        scored: Counter[tuple[int, int]] = Counter()
        for batches in of_rank:
            for batch in batches:
                inputs, targets = batch.to(CPU)
                assert inputs.shape == (batch_size, T)
                kept = targets != IGNORE_INDEX
                assert batch.scored_targets == kept.sum()
                scored.update(zip(inputs[kept].tolist(), targets[kept].tolist(), strict=True))
        text = numbered(tokens).tolist()
        assert scored == Counter(zip(text[:-1], text[1:], strict=True))

    def test_a_window_continues_where_the_previous_one_ends(self, tmp_path: Path) -> None:
        stream = validation_stream(tmp_path, 83)
        rows = [row for batch in validation_batches(stream, T, 3, 0, 1) for row in batch.tokens.tolist()]
        assert rows[0] == numbered(83)[0:6].tolist()
        assert rows[1] == numbered(83)[5:11].tolist()
        assert rows[16] == [*numbered(83)[80:83].tolist(), 0, 0, 0]

    @pytest.mark.parametrize("world_size", [1, 2, 4])
    def test_max_batches_are_spread_over_the_whole_split(self, tmp_path: Path, world_size: int) -> None:
        stream = validation_stream(tmp_path, 501)  # 100 windows
        starts = []
        text = numbered(501).tolist()
        for rank in range(world_size):
            batches = list(validation_batches(stream, T, 2, rank, world_size, max_batches=4))
            assert len(batches) == 4 // world_size
            for batch in batches:
                starts += [at for at in range(0, 500, T) for row in batch.tokens.tolist() if row == text[at : at + 6]]
        assert sorted(starts) == [0, 60, 125, 185, 250, 310, 375, 435]  # every 12.5 windows

    def test_more_batches_than_there_are_is_the_whole_split(self, tmp_path: Path) -> None:
        stream = validation_stream(tmp_path, 53)
        whole = [bytes_of(b) for b in validation_batches(stream, T, 2, 0, 1)]
        assert [bytes_of(b) for b in validation_batches(stream, T, 2, 0, 1, max_batches=6)] == whole
        assert [bytes_of(b) for b in validation_batches(stream, T, 2, 0, 1, max_batches=99)] == whole

    def test_padding_is_inside_the_vocabulary(self, tmp_path: Path) -> None:
        stream = validation_stream(tmp_path, 7)
        (batch,) = validation_batches(stream, T, 4, 0, 1)
        inputs, _ = batch.to(CPU)
        assert inputs.min() >= 0
        assert inputs.max() < VOCAB_SIZE


PREFETCH_PLAN = BatchPlan(2, 5, 2, 1)  # 4 samples per step


class WatchedLoader(TrainLoader):
    """Records what is read in which thread, and can be made to fail."""

    def __init__(self, folder: Path) -> None:
        super().__init__(
            [TokenDataset("only", str(folder), 1.0, open_split(folder, "train"), None)], PREFETCH_PLAN, 7, 0
        )
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
    """Wait until the next step has been read."""
    assert prefetcher._ahead is not None
    prefetcher._ahead[1].exception()


def test_batches_are_those_of_the_loader_in_any_order(loader: WatchedLoader) -> None:
    prefetcher = Prefetcher(loader, CPU)
    for consumed in (0, 4, 8, 40, 44, 8, 12, 12, 0):  # forward, a seek, back as after a rollback, the same again
        expected = TrainLoader.micro_batches(loader, consumed)
        assert tokens_of(prefetcher.micro_batches(consumed)) == tokens_of(expected)
    prefetcher.close()


def test_exactly_one_step_is_read_ahead(loader: WatchedLoader) -> None:
    prefetcher = Prefetcher(loader, CPU)
    assert loader.reads == []
    prefetcher.micro_batches(20)
    settle(prefetcher)
    assert loader.reads == [(20, True), (24, False)]
    prefetcher.micro_batches(24)
    settle(prefetcher)
    assert loader.reads == [(20, True), (24, False), (28, False)]
    prefetcher.micro_batches(100)  # a seek
    settle(prefetcher)
    assert loader.reads[3:] == [(100, True), (104, False)]
    prefetcher.close()


def test_an_error_while_reading_ahead_is_raised_when_the_step_is_requested(loader: WatchedLoader) -> None:
    loader.broken_from = 8
    prefetcher = Prefetcher(loader, CPU)
    prefetcher.micro_batches(0)
    prefetcher.micro_batches(4)
    settle(prefetcher)
    with pytest.raises(DataError, match="cannot read the samples after 8"):
        prefetcher.micro_batches(8)
    prefetcher.close()


def test_an_error_in_a_step_that_is_never_requested_is_ignored(loader: WatchedLoader) -> None:
    """A rollback may leave it out, or it is the step after the last."""
    loader.broken_from = 8
    prefetcher = Prefetcher(loader, CPU)
    prefetcher.micro_batches(4)
    settle(prefetcher)
    assert tokens_of(prefetcher.micro_batches(0)) == tokens_of(TrainLoader.micro_batches(loader, 0))
    prefetcher.close()


def test_no_thread_is_left_after_close(loader: WatchedLoader) -> None:
    prefetcher = Prefetcher(loader, CPU)
    assert prefetch_threads() == []
    prefetcher.micro_batches(0)
    assert len(prefetch_threads()) == 1
    prefetcher.micro_batches(400)
    assert len(prefetch_threads()) == 1
    prefetcher.close()
    assert prefetch_threads() == []
    Prefetcher(loader, CPU).close()  # never used


@pytest.mark.gpu
def test_batches_for_a_gpu_are_in_pinned_memory(loader: WatchedLoader, gpu: torch.device) -> None:
    prefetcher = Prefetcher(loader, gpu)
    for consumed in range(0, 80, 4):
        expected = TrainLoader.micro_batches(loader, consumed)
        batches = prefetcher.micro_batches(consumed)
        assert all(batch.tokens.is_pinned() for batch in batches)
        for batch, plain in zip(batches, expected, strict=True):
            assert [t.tolist() for t in batch.to(gpu)] == [t.tolist() for t in plain.to(CPU)]
    prefetcher.close()
