"""Requests as batches: what several of them begin with is computed once, and rows of like length go together.

The requests of one example (its choices) often share their context and more. Their tokens form a tree, whose nodes are
laid out in one row, parents first; a mask lets each node see its ancestors alone, so it computes what it would have in
a row of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from pipeline.evaluation.requests import Request
from pipeline.model.gpt2 import ScoringBatch

LEAST_SAVING = 0.1  # of tokens, for which rows are laid out as trees, whose mask has slower attention kernels


@dataclass
class Tree:
    """The inputs of some requests, each beginning that they share kept once. A node is a token of the row."""

    tokens: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)  # -1: of the first token
    places: list[int] = field(default_factory=list)  # in the text
    pairs: dict[tuple[int, int], int] = field(default_factory=dict)  # (node, token expected after it) -> number
    scored: list[tuple[int, list[int]]] = field(default_factory=list)  # (request, numbers of its pairs)
    _children: dict[tuple[int, int], int] = field(default_factory=dict)

    @property
    def is_chain(self) -> bool:
        """Whether every token sees all before it."""
        return all(parent == node - 1 for node, parent in enumerate(self.parents))

    def add(self, number: int, request: Request, context_length: int, reset_at: int | None) -> None:
        """Add a request; ``number`` is its own among all, ``reset_at`` as ``model.reset_positions_at``."""
        node, path = -1, []
        for token in request.inputs(context_length):
            node = self._child(node, token, reset_at)
            path.append(node)
        wanted = request.continuation
        pairs = [
            self.pairs.setdefault(pair, len(self.pairs)) for pair in zip(path[-len(wanted) :], wanted, strict=True)
        ]
        self.scored.append((number, pairs))

    def _child(self, parent: int, token: int, reset_at: int | None) -> int:
        node = self._children.get((parent, token))
        if node is None:
            node = self._children[parent, token] = len(self.tokens)
            self.tokens.append(token)
            self.parents.append(parent)
            self.places.append(0 if parent < 0 or token == reset_at else self.places[parent] + 1)
        return node

    def ancestors(self, width: int) -> np.ndarray:
        """(width, width) bool: which nodes each node sees; padding sees itself."""
        sees = np.eye(width, dtype=np.bool_)
        for node, parent in enumerate(self.parents):
            if parent >= 0:
                sees[node] |= sees[parent]
        return sees


@dataclass(frozen=True)
class Batch:
    """What the model scores, in host memory, and which scores belong to which request."""

    inputs: ScoringBatch
    requests: Tensor  # (L,) int64, the request of each link
    pairs: Tensor  # (L,) int64, the score that it adds to the request, into N


def grow_trees(
    groups: Sequence[Sequence[int]], requests: Sequence[Request], context_length: int, reset_at: int | None
) -> list[Tree]:
    """The requests as trees: one for a group (numbers of requests that may begin alike) if that saves enough."""

    def grow(numbers: Sequence[int]) -> Tree:
        tree = Tree()
        for number in numbers:
            tree.add(number, requests[number], context_length, reset_at)
        return tree

    trees: list[Tree] = []
    for group in groups:
        together = grow(group)
        apart = sum(len(requests[number].inputs(context_length)) for number in group)
        saves = len(together.tokens) <= (1 - LEAST_SAVING) * apart
        trees += [together] if saves or len(group) == 1 else [grow([number]) for number in group]
    return trees


def pack(trees: Sequence[Tree], batch_tokens: int) -> list[list[Tree]]:
    """Trees by falling length, in batches of at most ``batch_tokens`` with padding; one tree always fits."""
    ordered = sorted(trees, key=lambda tree: -len(tree.tokens))
    batches: list[list[Tree]] = []
    for tree in ordered:
        if not batches or len(batches[-1][0].tokens) * (len(batches[-1]) + 1) > batch_tokens:
            batches.append([])
        batches[-1].append(tree)
    return batches


def make_batch(trees: Sequence[Tree]) -> Batch:
    """The arrays of a batch. Rows are padded on the right, where no token of theirs looks."""
    width = max(len(tree.tokens) for tree in trees)
    tokens = np.zeros((len(trees), width), dtype=np.int64)
    pairs: list[tuple[int, int]] = []  # (output, target)
    links: list[tuple[int, int]] = []  # (request, pair)
    for row, tree in enumerate(trees):
        tokens[row, : len(tree.tokens)] = tree.tokens
        links += [(number, len(pairs) + pair) for number, numbers in tree.scored for pair in numbers]
        pairs += [(row * width + node, target) for node, target in tree.pairs]
    outputs, targets = _columns(pairs)
    requests, scores = _columns(links)
    inputs = ScoringBatch(torch.from_numpy(tokens), targets, outputs, *_layout(trees, width))
    return Batch(inputs, requests, scores)


def _columns(pairs: list[tuple[int, int]]) -> Iterator[Tensor]:
    return iter(torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2).T.contiguous())


def _layout(trees: Sequence[Tree], width: int) -> tuple[Tensor | None, Tensor | None]:
    """Places and mask of a batch; none where rows are plain texts, whose attention has faster kernels."""
    if all(tree.is_chain for tree in trees):
        return None, None
    places = np.zeros((len(trees), width), dtype=np.int64)
    for row, tree in enumerate(trees):
        places[row, : len(tree.places)] = tree.places
    mask = np.stack([tree.ancestors(width) for tree in trees])
    return torch.from_numpy(places), torch.from_numpy(mask).unsqueeze(1)
