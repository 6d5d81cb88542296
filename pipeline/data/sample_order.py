"""The order of the training samples: a fixed permutation per epoch, constant memory, O(1) seek."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from pipeline.seeds import derive_seed

IndexArray = npt.NDArray[np.int64]
_ROUNDS = 6
_MIX = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))  # splitmix64, Steele et al. 2014


class SampleOrder:
    """Maps the g-th sample of a run to one of ``n`` windows, for any g, as a function of the seed alone.

    Each epoch ``g // n`` has its own permutation: a balanced Feistel network over the next power of four, applied again
    until the result is below ``n`` (Black and Rogaway 2002). The order is the same at every world size, and a resume at
    sample g replays nothing.
    """

    def __init__(self, n: int, seed: int) -> None:
        assert n > 0
        self.n = n
        self.seed = seed
        self._half_bits = max(1, -(-(n - 1).bit_length() // 2))

    def windows(self, samples: IndexArray) -> IndexArray:
        """Return the window indices of global samples, both int64 of shape (B,)."""
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
    """Mix the bits as splitmix64 does; uint64 wraps around on purpose."""
    values = (values ^ (values >> np.uint64(30))) * _MIX[0]
    values = (values ^ (values >> np.uint64(27))) * _MIX[1]
    return values ^ (values >> np.uint64(31))
