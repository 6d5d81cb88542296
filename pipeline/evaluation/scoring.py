"""Compute the log-likelihood of the continuation in each scoring request.

The results do not depend on the batch size or the world size.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from tqdm import tqdm

from pipeline.backends import Backend
from pipeline.config.schema import ModelConfig
from pipeline.distributed.world import World
from pipeline.errors import TrainingError
from pipeline.evaluation.packing import Request, Tree, build_trees, make_batch, pack
from pipeline.hardware.device import copy_to, matmul_dtype, summing_dtype
from pipeline.model.attention import kernels_for_any_length
from pipeline.model.gpt2 import GPT2, ScoringBatch
from pipeline.model.packed_linear import pack_linear_layers
from pipeline.model.precision import ComputeModel, replicated_compute


@dataclass(frozen=True)
class Score:
    """The log-likelihood of a continuation in nats, and whether greedy decoding generates the continuation."""

    log_likelihood: float
    is_greedy: bool


@dataclass(frozen=True)
class Scorer:
    """A model that scores requests.

    Args:
        compute: the model, in evaluation mode.
        batch_tokens: the largest number of tokens per forward pass and rank, including padding.
        before_batch: is called on every rank before each forward pass.
    """

    compute: Backend | ComputeModel
    model: ModelConfig
    world: World
    batch_tokens: int
    before_batch: Callable[[], None] = lambda: None

    @torch.no_grad()
    def score(self, groups: Sequence[Sequence[Request]], label: str) -> list[list[Score]]:
        """Return the score of each request, in lists of the same shape as ``groups``.

        Every rank must call this method. All ranks get all scores.

        Args:
            groups: lists of requests. Scoring is faster if requests with the same beginning are in one list.
            label: the text next to the progress bar.

        Raises:
            TrainingError: a log-likelihood is not finite.
        """
        numbers: dict[Request, int] = {}
        new_in_groups = [_add_new(group, numbers) for group in groups]
        requests = list(numbers)
        longest = max((len(request.continuation) for request in requests), default=0)
        assert longest <= self.model.context_length, "tasks refuse longer continuations when they are prepared"
        with self.world.progress.patience():
            trees = build_trees(new_in_groups, requests, self.model.context_length, self.model.reset_positions_at)
            batches = pack(trees, self.batch_tokens)
        with kernels_for_any_length():
            sums = self._sum_scores(batches, len(requests), label)
        scores = [
            Score(log_likelihood, greedy_tokens == len(request.continuation))
            for request, (log_likelihood, greedy_tokens) in zip(requests, sums, strict=True)
        ]
        return [[scores[numbers[request]] for request in group] for group in groups]

    def _sum_scores(self, batches: Sequence[Sequence[Tree]], requests: int, label: str) -> list[list[float]]:
        """Return two values per request: the log-likelihood, and how many continuation tokens are the argmax."""
        world, device = self.world, self.world.device
        # A rank without a batch scores this token. Under FSDP and ZeRO-3, all ranks must run each forward pass.
        idle = [Tree(tokens=[0], parents=[-1], positions=[0], pairs={(0, 0): 0})]
        # Keep the sums on the device until the end, so that no forward pass waits for the previous forward pass.
        sums = torch.zeros(2, requests, dtype=summing_dtype(device), device=device)
        with tqdm(
            total=requests,
            desc=label,
            unit="request",
            leave=False,
            disable=None if world.is_main else True,  # None shows the bar only on a terminal
        ) as progress:
            for first in range(0, len(batches), world.size):
                self.before_batch()
                world.progress.pass_mark()
                turn = batches[first : first + world.size]  # one batch per rank
                inputs, links = make_batch(turn[world.rank] if world.rank < len(turn) else idle)
                log_probabilities, ranks = self.compute(_copy_batch(inputs, device), method="score")  # (N,) each
                scores = torch.stack((log_probabilities, ranks == 0)).to(sums.dtype)  # (2, N)
                to_requests, from_scores = copy_to(links, device)
                sums.index_add_(1, to_requests, scores[:, from_scores])
                progress.update(sum(len(tree.scored) for trees in turn for tree in trees))
        total = world.sum(sums)
        if not bool(torch.isfinite(total).all()):
            raise TrainingError(f"{label}: log-likelihoods are not finite; the model's weights are unusable")
        return total.T.tolist()


def compute_for_scoring(model: GPT2, precision: str, device: torch.device) -> ComputeModel:
    """Wrap a loaded model, so that it computes scores in the given precision.

    On a CPU, the linear layers of the model are replaced by faster ones.
    """
    pack_linear_layers(model, matmul_dtype(precision))
    return replicated_compute(model, precision, device).eval()


def _copy_batch(batch: ScoringBatch, device: torch.device) -> ScoringBatch:
    tensors: dict[str, Any] = {name: None if t is None else copy_to(t, device) for name, t in vars(batch).items()}
    return replace(batch, **tensors)


def _add_new(group: Sequence[Request], numbers: dict[Request, int]) -> range:
    """Give the next numbers to the requests of a group that have no number yet. Return these numbers."""
    first = len(numbers)
    for request in group:
        numbers.setdefault(request, len(numbers))
    return range(first, len(numbers))
