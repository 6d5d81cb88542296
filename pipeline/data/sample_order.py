"""The order of the training samples: a fixed permutation per epoch, in constant memory, O(1) to seek."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from pipeline.seeds import derive_seed

IndexArray = npt.NDArray[np.int64]
_ROUNDS = 6
_MIX = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))  # splitmix64, Steele et al. 2014


class SampleOrder:
    """Which of ``n`` windows the g-th sample of a run is, for any g, from the seed alone.

    Epoch ``g // n`` is a permutation of its own: a balanced Feistel network over the next power of
    four, walked until it lands below ``n`` (Black and Rogaway 2002). The world size does not enter,
    and nothing needs to be replayed to continue at sample g.
    """

    def __init__(self, n: int, seed: int) -> None:
        assert n > 0
        self.n = n
        self.seed = seed
        self._half_bits = max(1, -(-(n - 1).bit_length() // 2))

    def windows(self, samples: IndexArray) -> IndexArray:
        """Window indices of global samples, both int64 of shape (B,)."""
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
            left, right = right, left ^ (_mixed(right + key) & mask)
        return (left << bits) | right


def _mixed(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Scatter bits; uint64 wraps around on purpose."""
    values = (values ^ (values >> np.uint64(30))) * _MIX[0]
    values = (values ^ (values >> np.uint64(27))) * _MIX[1]
    return values ^ (values >> np.uint64(31))
