"""The validation task reports what a plain loop over the split finds."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data_tools.shards.reader import TokenStream, open_split
from pipeline.distributed.world import World
from pipeline.errors import TrainingError
from pipeline.evaluation import validation
from pipeline.evaluation.validation import mixture_loss
from pipeline.model.gpt2 import GPT2
from tests.pipeline.conftest import END_OF_TEXT, write_shards
from tests.pipeline.evaluation.conftest import ALONE, TOKENS, UTF8_BYTES, T, score


@pytest.fixture(scope="module")
def direct(model: GPT2, stream: TokenStream) -> list[tuple[int, int, float, int]]:
    """Return (position, target, loss, number of likelier tokens) of each target, from one forward pass per target."""
    text = stream.read(0, stream.tokens).astype(int).tolist()
    found = []
    for at in range(1, len(text)):
        begin = (at - 1) // T * T  # of the window that scores this target
        with torch.no_grad():
            logits = model.logits(torch.tensor([text[begin:at]]))[0, -1].double()
        loss = (logits.logsumexp(0) - logits[text[at]]).item()
        found.append((at - 1 - begin, text[at], loss, int((logits > logits[text[at]]).sum())))
    return found


def mean(values: Any) -> float:
    return float(np.mean(list(values)))


class TestValidation:
    def test_loss_and_perplexity(self, results: dict[str, Any], direct: list[Any]) -> None:
        expected = mean(loss for _, _, loss, _ in direct)
        assert results["loss"] == pytest.approx(expected, rel=1e-6)
        assert results["perplexity"] == pytest.approx(math.exp(expected), rel=1e-5)

    def test_the_interval_reflects_the_spread_of_the_windows(
        self,
        model: GPT2,
        stream: TokenStream,
        results: dict[str, Any],
        direct: list[Any],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        assert results["loss_interval"] is results["perplexity_interval"] is None, "11 windows are too few"
        assert results["interval"] == "none, fewer than 30 values"
        monkeypatch.setattr(validation, "FEWEST_VALUES", 11)
        results = score(model, stream, 4)
        losses = np.array([loss for _, _, loss, _ in direct])
        windows = [losses[start : start + T] for start in range(0, len(losses), T)]
        residues = [window.sum() - len(window) * losses.mean() for window in windows]
        half = 1.96 * np.sqrt(np.sum(np.square(residues)) * len(windows) / (len(windows) - 1)) / len(losses)
        assert results["loss_interval"] == pytest.approx([losses.mean() - half, losses.mean() + half], rel=1e-4)
        assert results["perplexity_interval"][1] == pytest.approx(math.exp(losses.mean() + half), rel=1e-3)

    def test_every_target_is_scored(self, results: dict[str, Any]) -> None:
        assert results["target_tokens"] == TOKENS - 1
        assert results["documents"] == 4

    def test_unknown_counts_are_not_zero(self, model: GPT2, tmp_path: Path) -> None:
        """A manifest has 0 bytes of text and 0 documents if the vocabulary is not GPT-2's or has no end of text."""
        tokens = np.arange(TOKENS) % (END_OF_TEXT - 1)
        write_shards(tmp_path / "data", {"val": [tokens]}, utf8_bytes=0)
        figures = score(model, open_split(tmp_path / "data", "val"), 3)
        assert (figures["utf8_bytes"], figures["documents"], figures["bits_per_byte"]) == (None, None, None)

    def test_bits_per_byte_leave_out_end_of_text(self, results: dict[str, Any], direct: list[Any]) -> None:
        assert sum(target == END_OF_TEXT for _, target, _, _ in direct) >= 3
        nats = sum(loss for _, target, loss, _ in direct if target != END_OF_TEXT)
        assert results["bits_per_byte"] == pytest.approx(nats / math.log(2) / UTF8_BYTES, rel=1e-6)

    def test_accuracy(self, results: dict[str, Any], direct: list[Any]) -> None:
        top1, top5 = (mean(rank < k for *_, rank in direct) for k in (1, 5))
        assert 0 < top1 < top5 < 1
        assert results["top1_accuracy"] == pytest.approx(top1)
        assert results["top5_accuracy"] == pytest.approx(top5)

    def test_loss_by_position(self, results: dict[str, Any], direct: list[Any]) -> None:
        expected = [mean(loss for at, _, loss, _ in direct if at == position) for position in range(T)]
        assert results["loss_by_position"] == pytest.approx(expected, rel=1e-6)

    @pytest.mark.parametrize("batch_size", [1, 3, 11, 50])
    def test_the_batch_size_does_not_matter(
        self, model: GPT2, stream: TokenStream, results: dict[str, Any], batch_size: int
    ) -> None:
        other = score(model, stream, batch_size)
        assert other.keys() == results.keys()
        for key in ("loss", "bits_per_byte", "top1_accuracy", "top5_accuracy", "target_tokens", "loss_by_position"):
            assert other[key] == pytest.approx(results[key], rel=1e-6), key

    @pytest.mark.parametrize("size", [2, 3, 4])
    def test_the_ranks_share_the_work(
        self, model: GPT2, stream: TokenStream, results: dict[str, Any], size: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The sums of all ranks together give the result of one process."""
        sums: list[list[torch.Tensor]] = []

        def collect(_world: World, values: torch.Tensor) -> torch.Tensor:
            sums[-1].append(values)
            return (
                torch.ones_like(values)
                if len(sums) < size
                else torch.stack([values_of_rank.pop(0) for values_of_rank in sums]).sum(0)
            )

        monkeypatch.setattr(World, "sum", collect)
        for rank in range(size):
            sums.append([])
            together = score(model, stream, 2, World(rank, size, rank, ALONE.device))
        assert together["loss"] == pytest.approx(results["loss"], rel=1e-6)
        assert together["target_tokens"] == TOKENS - 1

    def test_a_position_beyond_all_windows_has_no_loss(self, model: GPT2, data: Path, tmp_path: Path) -> None:
        folder = write_shards(tmp_path / "short", {"val": [np.arange(6)]}, utf8_bytes=0)
        results = score(model, open_split(folder, "val"), 2)
        assert results["bits_per_byte"] is None, "the bytes of text are unknown"
        losses = results["loss_by_position"]
        assert all(isinstance(loss, float) for loss in losses[:5])
        assert losses[5:] == [None] * 7


class TestMasks:
    MASK = np.random.default_rng(1).random(TOKENS) < 0.5

    @pytest.fixture
    def masked(self, data: Path, tmp_path: Path) -> Path:
        tokens = open_split(data, "val").read(0, TOKENS)
        shards, masks = np.split(tokens, [70]), np.split(self.MASK, [70])
        return write_shards(tmp_path / "masked", {"val": shards}, masks={"val": masks})

    def test_only_scored_targets_count(self, model: GPT2, masked: Path, direct: list[Any]) -> None:
        results = score(model, open_split(masked, "val"), 4)
        scored = [found for found, is_scored in zip(direct, self.MASK[1:], strict=True) if is_scored]
        assert results["loss"] == pytest.approx(mean(loss for _, _, loss, _ in scored), rel=1e-6)
        assert results["target_tokens"] == len(scored) == self.MASK[1:].sum()
        assert results["bits_per_byte"] is None

    def test_a_split_without_a_scored_target_is_an_error(self, model: GPT2, tmp_path: Path) -> None:
        tokens = np.arange(40)
        folder = write_shards(tmp_path / "none", {"val": [tokens]}, masks={"val": [np.zeros(40, dtype=np.bool_)]})
        with pytest.raises(TrainingError, match="the split 'val' has no scored target"):
            score(model, open_split(folder, "val"), 4)


def test_mixture_loss_is_the_weighted_mean() -> None:
    assert mixture_loss({"a": 1.0, "b": 2.0}, {"a": 3.0, "b": 1.0, "without a loss": 5.0}) == pytest.approx(1.25)


@pytest.mark.gpu
def test_a_gpu_measures_the_loss_of_a_cpu(
    model: GPT2, stream: TokenStream, results: dict[str, Any], gpu: torch.device
) -> None:
    found = score(copy.deepcopy(model).to(gpu), stream, 4, World(0, 1, 0, gpu))
    assert found["loss"] == pytest.approx(results["loss"], rel=1e-5)
    assert found["loss_by_position"] == pytest.approx(results["loss_by_position"], rel=1e-4)
    assert found["top1_accuracy"] == results["top1_accuracy"]
