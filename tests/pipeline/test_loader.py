"""Which tokens a step sees does not depend on the ranks, and validation sees every target once."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from data_tools.shards import TokenStream, open_split
from pipeline.batch_plan import BatchPlan
from pipeline.errors import ConfigError, TrainingError
from pipeline.loader import MicroBatch, TrainLoader, expect_same_vocabulary, validation_batches
from pipeline.model import IGNORE_INDEX
from tests.pipeline.conftest import VOCAB_SIZE, tiny_model_config, write_shards

T = 5
TRAIN_TOKENS = 331  # 66 windows
CPU = torch.device("cpu")


def numbered(count: int) -> np.ndarray:
    """Tokens from which their place in the stream can be read: no two runs of three are equal."""
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


def step_of_all_ranks(train: TokenStream, world_size: int, consumed: int, samples_per_step: int = 8) -> list[bytes]:
    """The micro-batches of a step, in the order of their samples."""
    plan = BatchPlan(2, T, samples_per_step // 2 // world_size, world_size)
    batches: list[MicroBatch] = []
    for rank in range(world_size):
        mine = TrainLoader(train, plan, 7, rank).micro_batches(consumed)
        assert len(mine) == plan.accumulation
        batches += mine
    return [batch.tokens.tobytes() for batch in sorted(batches, key=lambda batch: batch.first_sample)]


class TestTraining:
    def test_a_step_is_the_same_at_every_world_size(self, train: TokenStream) -> None:
        for consumed in (0, 8, 64, 800):  # the third reaches into the second epoch
            alone = step_of_all_ranks(train, 1, consumed)
            assert len(alone) == 4
            assert step_of_all_ranks(train, 2, consumed) == alone
            assert step_of_all_ranks(train, 4, consumed) == alone

    def test_ranks_share_no_samples(self, train: TokenStream) -> None:
        plan = BatchPlan(2, T, 3, 4)
        firsts = [b.first_sample for rank in range(4) for b in TrainLoader(train, plan, 7, rank).micro_batches(0)]
        assert sorted(firsts) == list(range(0, 24, 2))

    def test_the_samples_of_a_step_do_not_depend_on_the_micro_batch(self, train: TokenStream) -> None:
        def samples(micro_batch_size: int) -> list[bytes]:
            plan = BatchPlan(micro_batch_size, T, 8 // micro_batch_size, 1)
            batches = TrainLoader(train, plan, 7, 0).micro_batches(16)
            return [row.tobytes() for batch in batches for row in batch.tokens]

        assert samples(1) == samples(2) == samples(4) == samples(8)

    def test_consumed_samples_are_all_there_is_to_continue(self, train: TokenStream) -> None:
        plan = BatchPlan(2, T, 2, 1)
        running = TrainLoader(train, plan, 7, 0)
        steps = [running.micro_batches(consumed) for consumed in range(0, 400, 4)]
        fresh = TrainLoader(train, plan, 7, 0).micro_batches(200)
        assert [b.tokens.tobytes() for b in fresh] == [b.tokens.tobytes() for b in steps[50]]

    def test_an_epoch_is_every_window_once(self, train: TokenStream) -> None:
        plan = BatchPlan(2, T, 3, 1)  # 11 steps of 6 samples: 66 windows
        loader = TrainLoader(train, plan, 7, 0)
        for start in (0, 66):
            rows = [row for step in range(11) for b in loader.micro_batches(start + step * 6) for row in b.tokens]
            windows = [numbered(TRAIN_TOKENS)[at * T : at * T + T + 1].tolist() for at in range(66)]
            assert sorted(row.tolist() for row in rows) == sorted(windows)

    def test_the_last_input_of_a_window_has_its_target_in_the_data(self, tmp_path: Path) -> None:
        exact = open_split(write_shards(tmp_path / "exact", {"train": [numbered(6 * T)]}), "train")
        loader = TrainLoader(exact, BatchPlan(1, T, 5, 1), 7, 0)  # the sixth window would lack a token
        starts = {batch.tokens[0, :2].tobytes() for batch in loader.micro_batches(0)}
        assert len(starts) == 5
        with pytest.raises(TrainingError, match="30 tokens = 5 samples"):
            TrainLoader(exact, BatchPlan(1, T, 6, 1), 7, 0)

    def test_windows_do_not_depend_on_the_size_of_shards(self, train: TokenStream, tmp_path: Path) -> None:
        whole = open_split(write_shards(tmp_path / "whole", {"train": [numbered(TRAIN_TOKENS)]}), "train")
        assert step_of_all_ranks(whole, 1, 24) == step_of_all_ranks(train, 1, 24)

    def test_another_seed_another_order(self, train: TokenStream) -> None:
        plan = BatchPlan(2, T, 4, 1)
        first, second = (TrainLoader(train, plan, seed, 0).micro_batches(0) for seed in (1, 2))
        assert [b.tokens.tobytes() for b in first] != [b.tokens.tobytes() for b in second]

    def test_too_little_data_for_one_step(self, folder: Path) -> None:
        val = open_split(folder, "val")  # 13 tokens: 2 windows
        assert TrainLoader(val, BatchPlan(2, T, 1, 1), 7, 0).micro_batches(0)[0].tokens.shape == (2, T + 1)
        with pytest.raises(TrainingError, match=r"13 tokens = 2 samples of 5 .* the 3 of one step; .* to 10 or less"):
            TrainLoader(val, BatchPlan(3, T, 1, 1), 7, 0)


def test_tokens_of_another_vocabulary_are_refused(train: TokenStream) -> None:
    expect_same_vocabulary(train, tiny_model_config(), "data/x")
    with pytest.raises(ConfigError, match=r"vocab_size \(90\) is not the vocabulary of data/x \(test: 89\)"):
        expect_same_vocabulary(train, tiny_model_config(vocab_size=90), "data/x")


class TestMicroBatch:
    TOKENS = np.array([[1, 2, 3, 4], [5, 6, 7, 8]], dtype=np.uint16)

    def test_targets_are_the_inputs_one_token_further(self) -> None:
        inputs, targets = MicroBatch(0, self.TOKENS).to(CPU)
        assert inputs.tolist() == [[1, 2, 3], [5, 6, 7]]
        assert targets.tolist() == [[2, 3, 4], [6, 7, 8]]
        assert inputs.dtype == targets.dtype == torch.int64

    def test_targets_of_a_training_batch_are_the_next_tokens_of_the_text(self, train: TokenStream) -> None:
        (batch,) = TrainLoader(train, BatchPlan(4, T, 1, 1), 7, 0).micro_batches(0)
        inputs, targets = batch.to(CPU)
        text = numbered(TRAIN_TOKENS).tolist()
        for input_row, target_row in zip(inputs.tolist(), targets.tolist(), strict=True):
            (at,) = [at for at in range(0, 330, T) if text[at : at + T + 1] == [*input_row, target_row[-1]]]
            assert target_row == text[at + 1 : at + T + 1]

    def test_masked_targets_are_ignored_and_not_counted(self) -> None:
        mask = np.array([[True, False, True], [False, False, False]])
        batch = MicroBatch(0, self.TOKENS, mask)
        inputs, targets = batch.to(CPU)
        assert inputs.tolist() == [[1, 2, 3], [5, 6, 7]]
        assert targets.tolist() == [[2, IGNORE_INDEX, 4], [IGNORE_INDEX] * 3]
        assert batch.scored_targets == 2
        assert MicroBatch(0, self.TOKENS).scored_targets == 6

    def test_large_ids_survive(self) -> None:
        inputs, _ = MicroBatch(0, np.array([[50256, 65535, 40000]], dtype=np.uint16)).to(CPU)
        assert inputs.tolist() == [[50256, 65535]]

    def test_a_target_mask_is_asked_for_the_right_windows(self, train: TokenStream) -> None:
        def even_windows(starts: np.ndarray, seq_len: int) -> np.ndarray:
            return np.repeat((starts // seq_len % 2 == 0)[:, None], seq_len, axis=1)

        loader = TrainLoader(train, BatchPlan(6, T, 1, 1), 7, 0, even_windows)
        (batch,) = loader.micro_batches(0)
        _, targets = batch.to(CPU)
        text = numbered(TRAIN_TOKENS).tolist()
        for row, target_row in zip(batch.tokens.tolist(), targets.tolist(), strict=True):
            (at,) = [at for at in range(0, 330, T) if text[at : at + T + 1] == row]
            assert target_row == (row[1:] if at // T % 2 == 0 else [IGNORE_INDEX] * T)


class TestValidation:
    @pytest.mark.parametrize("world_size", [1, 2, 3, 4])
    @pytest.mark.parametrize("batch_size", [1, 2, 7])
    @pytest.mark.parametrize("tokens", [2, 6, 51, 52, 53, 83])  # the last window is whole, or lacks some targets
    def test_every_target_once_over_all_ranks(
        self, tmp_path: Path, tokens: int, batch_size: int, world_size: int
    ) -> None:
        stream = validation_stream(tmp_path, tokens)
        of_rank = [list(validation_batches(stream, T, batch_size, rank, world_size)) for rank in range(world_size)]
        assert len({len(batches) for batches in of_rank}) == 1, "every rank must run equally many forward passes"
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

    def test_a_window_continues_where_the_one_before_ended(self, tmp_path: Path) -> None:
        stream = validation_stream(tmp_path, 83)
        rows = [row for batch in validation_batches(stream, T, 3, 0, 1) for row in batch.tokens.tolist()]
        assert rows[0] == numbered(83)[0:6].tolist()
        assert rows[1] == numbered(83)[5:11].tolist()
        assert rows[16] == [*numbered(83)[80:83].tolist(), 0, 0, 0]

    @pytest.mark.parametrize("world_size", [1, 2, 4])
    def test_a_part_of_the_split_is_spread_over_all_of_it(self, tmp_path: Path, world_size: int) -> None:
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
        whole = [b.tokens.tobytes() for b in validation_batches(stream, T, 2, 0, 1)]
        assert [b.tokens.tobytes() for b in validation_batches(stream, T, 2, 0, 1, max_batches=6)] == whole
        assert [b.tokens.tobytes() for b in validation_batches(stream, T, 2, 0, 1, max_batches=99)] == whole

    def test_padding_is_inside_the_vocabulary(self, tmp_path: Path) -> None:
        stream = validation_stream(tmp_path, 7)
        (batch,) = validation_batches(stream, T, 4, 0, 1)
        inputs, _ = batch.to(CPU)
        assert inputs.min() >= 0
        assert inputs.max() < VOCAB_SIZE
