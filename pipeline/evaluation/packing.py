"""Define scoring requests, and pack requests into batches.

The requests of one example often begin with the same context. A tree of tokens stores this common beginning once, so
the model processes it only once. A tree is one row of a batch. An attention mask lets each token attend only to itself
and to the tokens before it in the same request.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from pipeline.model.gpt2 import ScoringBatch

#: The least fraction of tokens that a tree must save. A tree that saves less is slower than separate requests, because
#: masked attention is slow.
LEAST_SAVING = 0.1
#: The largest fraction of padding in a batch.
MOST_PADDING = 0.1
#: Batches up to this fraction of ``batch_tokens`` may have more padding, because small batches are slow, too.
SMALL_BATCH = 0.25


@dataclass(frozen=True)
class Request:
    """The tokens of a context, and the tokens of a continuation to score."""

    context: tuple[int, ...]  # at least one token
    continuation: tuple[int, ...]  # at least one token

    def inputs(self, context_length: int) -> tuple[int, ...]:
        """Return the tokens that the model must read to score the continuation.

        These are the context, and the continuation without its last token. Only the last ``context_length`` of these
        tokens are returned.
        """
        return (self.context + self.continuation)[:-1][-context_length:]

    def is_truncated(self, context_length: int) -> bool:
        """Return whether ``inputs`` leaves out the beginning of the context."""
        return len(self.context) + len(self.continuation) - 1 > context_length


@dataclass
class Tree:
    """The tokens of several requests. Each node is one token. Requests share the nodes of their common beginning."""

    tokens: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)  # the node of the previous token; -1 for the first token
    positions: list[int] = field(default_factory=list)  # the position of each token in its text
    pairs: dict[tuple[int, int], int] = field(default_factory=dict)  # (node, target token after the node) -> index
    scored: list[tuple[int, list[int]]] = field(default_factory=list)  # (request number, indices of the pairs to score)
    _children: dict[tuple[int, int], int] = field(default_factory=dict)

    @property
    def is_chain(self) -> bool:
        """Return whether the tree has no branches. Such a tree needs only the normal causal mask."""
        return all(parent == node - 1 for node, parent in enumerate(self.parents))

    def add(self, number: int, request: Request, context_length: int, reset_at: int | None) -> None:
        """Add the tokens of a request to the tree.

        Args:
            context_length: the largest number of tokens per request. The first tokens of a longer request are left out.
            reset_at: the id of the token at which positions restart at 0. If None, they do not restart.
        """
        node, path = -1, []
        for token in request.inputs(context_length):
            parent, node = node, self._children.setdefault((node, token), len(self.tokens))
            if node == len(self.tokens):
                self.tokens.append(token)
                self.parents.append(parent)
                self.positions.append(0 if parent < 0 or token == reset_at else self.positions[parent] + 1)
            path.append(node)
        targets = request.continuation
        pairs = zip(path[-len(targets) :], targets, strict=True)
        self.scored.append((number, [self.pairs.setdefault(pair, len(self.pairs)) for pair in pairs]))

    def ancestors(self, width: int) -> np.ndarray:
        """Return the attention mask of the tree, padded to shape (width, width). True allows attention.

        Each token attends to itself and its ancestors. Padding attends only to itself.
        """
        mask = np.eye(width, dtype=np.bool_)
        for node, parent in enumerate(self.parents):
            if parent >= 0:
                mask[node] |= mask[parent]
        return mask


def build_trees(
    groups: Sequence[Sequence[int]], requests: Sequence[Request], context_length: int, reset_at: int | None
) -> list[Tree]:
    """Build one ``Tree`` of tokens per group of requests.

    A tree must save at least the fraction ``LEAST_SAVING`` of the group's tokens. Otherwise, each request of the group
    gets its own tree.

    Args:
        groups: the indices of each group's requests in ``requests``.
        context_length: the largest number of tokens per request. The first tokens of a longer request are left out.
        reset_at: the id of the token at which positions restart at 0. If None, they do not restart.
    """

    def build(numbers: Sequence[int]) -> Tree:
        tree = Tree()
        for number in numbers:
            tree.add(number, requests[number], context_length, reset_at)
        return tree

    trees: list[Tree] = []
    for group in filter(len, groups):
        shared = build(group)
        separate_tokens = sum(len(requests[number].inputs(context_length)) for number in group)
        saves = len(shared.tokens) <= (1 - LEAST_SAVING) * separate_tokens
        trees += [shared] if saves or len(group) == 1 else [build([number]) for number in group]
    return trees


def pack(trees: Sequence[Tree], batch_tokens: int) -> list[list[Tree]]:
    """Sort trees by decreasing length, and divide them into batches.

    A batch has at most ``batch_tokens`` tokens, including padding. A longer tree gets its own batch.
    """
    batches: list[list[Tree]] = []
    own_tokens = 0  # of the last batch, without padding
    for tree in sorted(trees, key=lambda tree: -len(tree.tokens)):
        own_tokens += len(tree.tokens)
        if not batches or not _fits(len(batches[-1][0].tokens) * (len(batches[-1]) + 1), own_tokens, batch_tokens):
            batches.append([])
            own_tokens = len(tree.tokens)
        batches[-1].append(tree)
    return batches


def _fits(padded_tokens: int, own_tokens: int, batch_tokens: int) -> bool:
    """Return whether a batch is small enough, and does not have too much padding.

    Args:
        padded_tokens: the number of tokens in the batch, including padding.
        own_tokens: the number of tokens in the batch, without padding.
    """
    if padded_tokens <= SMALL_BATCH * batch_tokens:
        return True
    return padded_tokens <= batch_tokens and own_tokens >= (1 - MOST_PADDING) * padded_tokens


def make_batch(trees: Sequence[Tree]) -> tuple[ScoringBatch, Tensor]:
    """Build the input of one forward pass that scores the requests in the trees.

    A *pair* is a token to score and the token before it. The model returns one score per pair. The score of a request
    is the sum of the scores of its pairs. A pair can belong to several requests.

    Returns:
        The input, in host memory, with one row per tree, padded on the right.

        An int64 tensor with two rows. Each column contains the index of a request, and the index of one of its pairs.
    """
    width = max(len(tree.tokens) for tree in trees)
    tokens = np.zeros((len(trees), width), dtype=np.int64)
    positions = np.zeros_like(tokens)
    pairs: list[tuple[int, int]] = []  # (output, target)
    links: list[tuple[int, int]] = []  # (request, pair)
    for row, tree in enumerate(trees):
        tokens[row, : len(tree.tokens)] = tree.tokens
        positions[row, : len(tree.tokens)] = tree.positions
        links += [(number, len(pairs) + pair) for number, numbers in tree.scored for pair in numbers]
        pairs += [(row * width + node, target) for node, target in tree.pairs]
    outputs, targets = torch.tensor(pairs).T.contiguous()
    inputs = ScoringBatch(torch.from_numpy(tokens), targets, outputs)
    if not all(tree.is_chain for tree in trees):  # without a mask, attention uses the faster causal kernels
        mask = torch.from_numpy(np.stack([tree.ancestors(width) for tree in trees])).unsqueeze(1)
        inputs = replace(inputs, positions=torch.from_numpy(positions), mask=mask)
    return inputs, torch.tensor(links, dtype=torch.int64).reshape(-1, 2).T.contiguous()
