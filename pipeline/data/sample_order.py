"""Map the number of a sample to a dataset, and to a window (a range of tokens) of this dataset.

The result does not depend on earlier samples, so a run can resume at any sample. A mixture assigns samples to datasets
in proportion to the datasets' weights. Within a dataset, each epoch has a different random order of the windows.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import numpy.typing as npt

from pipeline.seeds import derive_seed

IndexArray = npt.NDArray[np.int64]
_ROUNDS = 6
_MIX = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))  # splitmix64, Steele et al. 2014


class SampleOrder:
    """Maps the number g of a sample to one of ``n`` windows.

    Sample g belongs to epoch ``g // n``. Each epoch has a different permutation of the windows, which depends on the
    seed. A balanced Feistel network permutes the numbers below 4**k, the smallest power of four that is at least ``n``.
    The network is applied again to its result until the result is below ``n`` (Black and Rogaway 2002).
    """

    def __init__(self, n: int, seed: int) -> None:
        assert n > 0
        self.n = n
        self.seed = seed
        self._half_bits = max(1, -(-(n - 1).bit_length() // 2))

    def windows(self, samples: IndexArray) -> IndexArray:
        """Return the window of each sample. The argument and the result are int64 of shape (B,)."""
        epochs, positions = np.divmod(samples, self.n)
        windows = np.empty_like(positions)
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            windows[chosen] = self._permute(positions[chosen], int(epoch))
        return windows

    def _permute(self, positions: IndexArray, epoch: int) -> IndexArray:
        keys = [np.uint64(derive_seed(self.seed, "order", epoch, i)) for i in range(_ROUNDS)]
        values = self._feistel(positions.astype(np.uint64), keys)
        while (outside := values >= self.n).any():
            values[outside] = self._feistel(values[outside], keys)
        return values.astype(np.int64)

    def _feistel(self, values: npt.NDArray[np.uint64], keys: list[np.uint64]) -> npt.NDArray[np.uint64]:
        bits = np.uint64(self._half_bits)
        mask = np.uint64((1 << self._half_bits) - 1)
        left, right = values >> bits, values & mask
        for key in keys:
            left, right = right, left ^ (_mix(right + key) & mask)
        return (left << bits) | right


def _mix(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Mix the bits as splitmix64 does. The uint64 arithmetic wraps around on purpose."""
    values = (values ^ (values >> np.uint64(30))) * _MIX[0]
    values = (values ^ (values >> np.uint64(27))) * _MIX[1]
    return values ^ (values >> np.uint64(31))


@dataclass(frozen=True)
class _Fork:
    """An inner node of a ``Mixture``'s tree.

    The left child gets round(n * left_weight / weight) of the node's first n samples.
    """

    left: _Fork | int
    right: _Fork | int
    left_weight: int
    weight: int

    def left_of(self, samples: int) -> int:
        """Return how many of the first ``samples`` samples go to the left child."""
        return (2 * samples * self.left_weight + self.weight) // (2 * self.weight)


class Mixture:
    """Assigns the samples of a run to datasets in proportion to their weights.

    Let s be a dataset's entry in ``shares``. The dataset provides n * s of the first n samples, with an error of less
    than two samples. The datasets are the leaves of a Huffman tree (Huffman 1952). The dataset of a sample depends only
    on the weights and the sample's number.

    Attributes:
        shares: the exact fraction of the samples from each dataset.
    """

    # Why the error is less than two samples: Each node on the path to a leaf adds a rounding error of at most 1/2.
    # Each node further down multiplies this error by its share of its parent's samples. In a Huffman tree, the product
    # of two such factors in a row is at most 1/2. The sum is less than 1/2 * (1 + 1 + 1/2 + 1/2 + ...) = 2.

    def __init__(self, weights: Sequence[float]) -> None:
        """Build the tree from positive weights. The weight 0.1 means exactly 1/10, not the nearest float."""
        exact = [Fraction(str(weight)) for weight in weights]
        assert exact and min(exact) > 0, "a mixture has datasets with positive weights"
        self.shares = [weight / sum(exact) for weight in exact]
        self._root = _huffman_tree(self.shares)

    def locate(self, sample: int) -> tuple[int, int]:
        """Return the index of the dataset of a sample, and the number of earlier samples from this dataset."""
        node, ordinal = self._root, sample
        while isinstance(node, _Fork):
            left = node.left_of(ordinal)
            if node.left_of(ordinal + 1) > left:
                node, ordinal = node.left, left
            else:
                node, ordinal = node.right, ordinal - left
        return node, ordinal

    def locate_all(self, samples: IndexArray) -> tuple[IndexArray, IndexArray]:
        """Return what ``locate`` returns for each of B samples, as two int64 arrays of shape (B,)."""
        if not isinstance(self._root, _Fork):
            return np.zeros_like(samples), samples
        located = np.array([self.locate(sample) for sample in samples.tolist()], dtype=np.int64).reshape(-1, 2)
        return located[:, 0], located[:, 1]

    def counts(self, samples: int) -> list[int]:
        """Return how many of the first ``samples`` samples come from each dataset."""
        counts = [0] * len(self.shares)
        waiting: list[tuple[_Fork | int, int]] = [(self._root, samples)]
        while waiting:
            node, reached = waiting.pop()
            if isinstance(node, _Fork):
                left = node.left_of(reached)
                waiting += [(node.left, left), (node.right, reached - left)]
            else:
                counts[node] = reached
        return counts


def _huffman_tree(shares: Sequence[Fraction]) -> _Fork | int:
    """Return the root of the tree. The leaves are indices of datasets.

    If two nodes have equal weights, the node that was created first is merged first.
    """
    denominator = math.lcm(*(share.denominator for share in shares))
    heap: list[tuple[int, int, _Fork | int]] = [
        (int(share * denominator), index, index) for index, share in enumerate(shares)
    ]
    heapq.heapify(heap)
    for age in range(len(shares), 2 * len(shares) - 1):
        left_weight, _, left = heapq.heappop(heap)
        right_weight, _, right = heapq.heappop(heap)
        weight = left_weight + right_weight
        heapq.heappush(heap, (weight, age, _Fork(left, right, left_weight, weight)))
    return heap[0][2]
