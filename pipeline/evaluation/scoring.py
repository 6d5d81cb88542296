"""The one scorer of all tasks: requests in, log-likelihoods out, the same at any batch size and number of ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from data_tools.errors import DataError
from pipeline.config.schema import ModelConfig
from pipeline.distributed.device import summing_dtype
from pipeline.distributed.world import World
from pipeline.errors import TrainingError
from pipeline.evaluation.packing import Batch, Tree, grow_trees, make_batch, pack
from pipeline.evaluation.requests import Request, Score
from pipeline.model.gpt2 import ScoringBatch


class ScoringModel(Protocol):
    """A backend, a model, or a model in one precision."""

    def score(self, batch: ScoringBatch) -> Tensor:
        """Return what ``GPT2.score`` returns."""


@dataclass(frozen=True)
class Scorer:
    """A model that scores requests.

    Args:
        compute: a backend or a model, in evaluation mode.
        model: its config.
        batch_tokens: tokens of a forward pass and rank, padding included. Does not change the result.
    """

    compute: ScoringModel
    model: ModelConfig
    world: World
    batch_tokens: int

    @torch.no_grad()
    def score(self, groups: Sequence[Sequence[Request]], label: str) -> list[list[Score]]:
        """Score requests; those of a group may begin alike. Collective; every rank gets all scores.

        Batches are dealt to the ranks in turn, and every rank runs equally many forward passes, which are collective
        under FSDP and ZeRO-3. A request that stands twice is scored once.

        Args:
            label: for the progress bar.

        Raises:
            DataError: a continuation is longer than the model's context.
            TrainingError: a log-likelihood is not finite.
        """
        requests = list(dict.fromkeys(request for group in groups for request in group))
        numbers = {request: number for number, request in enumerate(requests)}
        self._expect_short_continuations(requests)
        trees = grow_trees(_first_uses(groups, numbers), requests, *self._limits())
        sums = self._sums(pack(trees, self.batch_tokens), requests, label)
        scores = [
            Score(log_likelihood, hits == len(request.continuation))
            for request, (log_likelihood, hits) in zip(requests, sums, strict=True)
        ]
        return [[scores[numbers[request]] for request in group] for group in groups]

    def _sums(
        self, batches: Sequence[Sequence[Tree]], requests: Sequence[Request], label: str
    ) -> list[tuple[float, float]]:
        """Log-likelihood and number of likeliest tokens of each request."""
        world = self.world
        sums = torch.zeros(2, len(requests), dtype=summing_dtype(world.device), device=world.device)
        rounds = -(-len(batches) // world.size)
        with tqdm(
            total=len(requests),
            desc=label,
            unit="request",
            leave=False,
            disable=None if world.is_main else True,  # None: shown on a terminal only
        ) as progress:
            for turn in range(rounds):
                number = turn * world.size + world.rank
                batch = make_batch(batches[number] if number < len(batches) else [_idle_tree()])
                # Sums stay on the device: the ranks wait for it once, at the end.
                self._add_scores(sums, batch)
                progress.update(sum(len(tree.scored) for trees in _turn(batches, turn, world.size) for tree in trees))
        found = world.sum(sums).T.tolist()
        if not bool(torch.isfinite(torch.tensor(found)).all()):
            raise TrainingError(f"{label}: log-likelihoods are not finite: the weights of this model are no use")
        return [(log_likelihood, hits) for log_likelihood, hits in found]

    def _add_scores(self, sums: Tensor, batch: Batch) -> None:
        device = self.world.device
        scores = self.compute.score(batch.inputs.to(device))
        links = scores.to(sums.dtype)[:, batch.pairs.to(device)]  # (2, L)
        sums.index_add_(1, batch.requests.to(device), links)

    def _limits(self) -> tuple[int, int | None]:
        return self.model.context_length, self.model.reset_positions_at

    def _expect_short_continuations(self, requests: Sequence[Request]) -> None:
        longest = max((len(request.continuation) for request in requests), default=0)
        if longest > self.model.context_length:
            raise DataError(
                f"a continuation has {longest} tokens, more than the model's context of {self.model.context_length}; "
                "score it as a text, in windows"
            )


def _first_uses(groups: Sequence[Sequence[Request]], numbers: dict[Request, int]) -> list[list[int]]:
    """Groups as numbers of requests, each request where it comes first; groups left empty are dropped."""
    seen: set[int] = set()
    kept = []
    for group in groups:
        new = [number for number in dict.fromkeys(numbers[request] for request in group) if number not in seen]
        seen.update(new)
        if new:
            kept.append(new)
    return kept


def _idle_tree() -> Tree:
    """What a rank computes while others have the last batches: one token, scored for no request."""
    return Tree(tokens=[0], parents=[-1], places=[0], pairs={(0, 0): 0})


def _turn(batches: Sequence[Sequence[Tree]], turn: int, size: int) -> Sequence[Sequence[Tree]]:
    return batches[turn * size : (turn + 1) * size]
