"""Every data set gets its share in every range of samples, and any sample is found without the ones before."""

from __future__ import annotations

import random
from collections import Counter
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from data_tools.shards import open_split
from pipeline.data.batch_plan import BatchPlan
from pipeline.data.datasets import TokenDataset
from pipeline.data.loader import MicroBatch, TrainLoader
from pipeline.data.mixture import Mixture
from pipeline.data.sample_order import SampleOrder
from pipeline.errors import TrainingError
from tests.pipeline.conftest import write_shards

T = 4
WEIGHTS = [
    [1.0],
    [1.0, 1.0],
    [0.7, 0.2, 0.1],
    [1.0, 2.0, 3.0, 5.0, 8.0],
    [0.333, 0.667],
    [100.0, 1.0, 1.0, 1.0],
    [1e-4, 1.0],
    [0.9, 0.09, 0.009, 0.0009, 0.0001],
    [0.12, 0.34, 0.01, 0.23, 0.05, 0.25],
]


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
def test_every_prefix_holds_each_share_to_within_two_samples(weights: list[float]) -> None:
    mixture = Mixture(weights)
    assert sum(mixture.shares) == 1
    counts = [0] * len(weights)
    for sample in range(3000):
        index, ordinal = mixture.locate(sample)
        assert ordinal == counts[index], "ordinals of a data set are consecutive"
        counts[index] += 1
        assert all(abs(count - (sample + 1) * share) < 2 for count, share in zip(counts, mixture.shares, strict=True))
    assert mixture.counts(3000) == counts


def test_random_mixtures_hold_their_shares_at_large_counts() -> None:
    """Up to 40 data sets with weights over six orders of magnitude, and up to 10**15 samples."""
    draw = random.Random(5)
    worst = 0.0
    for _ in range(200):
        weights = [round(10 ** draw.uniform(-3, 3), 6) for _ in range(draw.randint(2, 40))]
        mixture = Mixture(weights)
        samples = draw.randrange(10**15)
        counts = mixture.counts(samples)
        assert sum(counts) == samples
        worst = max(worst, *(abs(count - samples * share) for count, share in zip(counts, mixture.shares, strict=True)))
        index, ordinal = mixture.locate(samples)
        assert ordinal == counts[index]
        after = mixture.counts(samples + 1)
        assert [b - a for a, b in zip(counts, after, strict=True)] == [int(i == index) for i in range(len(weights))]
    assert 0.5 < worst < 2


def test_a_weight_is_an_exact_decimal_number() -> None:
    assert Mixture([0.7, 0.2, 0.1]).shares == [Fraction(7, 10), Fraction(2, 10), Fraction(1, 10)]
    assert Mixture([7, 2, 1]).shares == Mixture([0.7, 0.2, 0.1]).shares
    assert Mixture([0.7, 0.2, 0.1]).counts(10**18) == [7 * 10**17, 2 * 10**17, 10**17]


def test_the_data_sets_alternate() -> None:
    """Samples of equal weights alternate, and rare samples are evenly spaced."""
    datasets = [Mixture([1, 1]).locate(sample)[0] for sample in range(100)]
    assert all(datasets[at] != datasets[at + 1] for at in range(99))
    rare = [sample for sample in range(10_000) if Mixture([1, 99]).locate(sample)[0] == 0]
    assert set(np.diff(rare).tolist()) == {100}


def test_locate_all_equals_locate() -> None:
    mixture = Mixture([0.5, 0.3, 0.2])
    samples = np.array([10**12, 0, 7, 8, 7], dtype=np.int64)
    datasets, ordinals = mixture.locate_all(samples)
    assert list(zip(datasets.tolist(), ordinals.tolist(), strict=True)) == [mixture.locate(s) for s in samples.tolist()]
    assert (datasets.dtype, ordinals.dtype) == (np.int64, np.int64)
    assert [array.shape for array in mixture.locate_all(samples[:0])] == [(0,), (0,)]


class TestTraining:
    """Three data sets with different tokens: 10 to 19, 20 to 29, 30 to 39."""

    WEIGHTS = (0.5, 0.3, 0.2)
    WINDOWS = (11, 30, 7)

    @pytest.fixture
    def datasets(self, tmp_path: Path) -> list[TokenDataset]:
        made = []
        for index, (weight, windows) in enumerate(zip(self.WEIGHTS, self.WINDOWS, strict=True)):
            # The first two tokens of a window name it.
            tokens = np.full((windows, T), 10 * (index + 1))
            tokens[:, 0] += np.arange(windows) % 10
            tokens[:, 1] += np.arange(windows) // 10
            folder = write_shards(tmp_path / f"data_{index}", {"train": [np.append(tokens, 0)]})
            made.append(TokenDataset(f"data_{index}", str(folder), weight, open_split(folder, "train"), None))
        return made

    @staticmethod
    def step(datasets: list[TokenDataset], world_size: int, consumed: int, seed: int = 7) -> list[MicroBatch]:
        """The micro-batches of 8 samples over all ranks, in the order of their samples."""
        plan = BatchPlan(2, T, 4 // world_size, world_size)
        batches = [
            batch
            for rank in range(world_size)
            for batch in TrainLoader(datasets, plan, seed, rank).micro_batches(consumed)
        ]
        return sorted(batches, key=lambda batch: batch.first_sample)

    @staticmethod
    def windows_of(batches: list[MicroBatch]) -> list[tuple[int, int]]:
        """Data set and window of each sample."""
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
            assert len({tuple(epoch) for epoch in epochs}) == len(epochs), "every epoch has an order of its own"

    def test_seeds_differ_and_repeat(self, datasets: list[TokenDataset]) -> None:
        first, again, other = (self.windows_of(self.step(datasets, 1, 16, seed)) for seed in (1, 1, 2))
        assert first == again != other
        assert [index for index, _ in first] == [index for index, _ in other]

    def test_a_mixture_of_one_is_that_data_set(self, datasets: list[TokenDataset]) -> None:
        order = SampleOrder(self.WINDOWS[1], 7)
        expected = order.windows(np.arange(16, 24, dtype=np.int64)).tolist()
        assert self.windows_of(self.step(datasets[1:2], 1, 16)) == [(1, window) for window in expected]

    def test_a_data_set_without_a_mask_is_scored_everywhere(self, datasets: list[TokenDataset], tmp_path: Path) -> None:
        tokens, mask = np.full(41, 50), np.arange(41) % T == 0  # the last target of a window
        folder = write_shards(tmp_path / "masked", {"train": [tokens]}, masks={"train": [mask]})
        masked = TokenDataset("masked", str(folder), 1.0, open_split(folder, "train"), None)
        batches = self.step([*datasets, masked], 1, 0)
        for batch in batches:
            assert batch.target_mask is not None
            for row, scored in zip(batch.tokens.tolist(), batch.target_mask.tolist(), strict=True):
                assert scored == ([False, False, False, True] if row[0] == 50 else [True] * T)
        assert {row[0] // 10 for batch in batches for row in batch.tokens.tolist()} >= {1, 2, 5}

    def test_a_data_set_that_is_too_small_for_its_share_is_refused(self, datasets: list[TokenDataset]) -> None:
        TrainLoader(datasets, BatchPlan(22, T, 1, 1), 7, 0)  # 11, 6.6 and 4.4 samples a step
        message = (
            r"data\.mixture: the split 'train' of .*data_0 has 45 tokens = 11 samples of 4 tokens, fewer than the 12 "
            r"per step that its share of 50\.00% takes; lower its weight or batch\.tokens_per_step"
        )
        with pytest.raises(TrainingError, match=message) as caught:
            TrainLoader(datasets, BatchPlan(23, T, 1, 1), 7, 0)
        assert "\n" not in str(caught.value)
