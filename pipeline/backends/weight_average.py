"""Keep an exponential moving average (EMA) of the master weights over the steps of a run.

A master is a tensor that the optimizer updates. Its average is a tensor with the same shape and sharding. A rank
therefore holds the averages of exactly the weights that it updates.
"""

import math
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from pipeline.backends.ranges import local_elements

_SWAPPED_ELEMENTS = 1 << 22  # 16 MiB, the size of the temporary copy while weights and averages are exchanged


class WeightAverage:
    """Keep a moving average of each master (tensor that the optimizer updates) on this rank, in fp32.

    When the averages are first needed, they are created as copies of the masters. They are not created earlier, because
    a backend can change the values of its masters before the first step.

    Args:
        masters: the tensors in fp32 that the optimizer updates on this rank.
    """

    def __init__(self, masters: Iterable[Tensor]) -> None:
        self.masters = list(masters)
        self._averages: dict[int, Tensor] = {}  # id(master) -> average

    def of(self, master: Tensor) -> Tensor:
        """Return the moving average of a master. The average has the same shape and sharding as the master."""
        if id(master) not in self._averages:
            self._averages[id(master)] = master.detach().clone()
        return self._averages[id(master)]

    def create(self) -> None:
        """Create the averages that do not exist yet. Call this method before the first update of the masters."""
        for master in self.masters:
            self.of(master)

    @torch.no_grad()
    def update(self, decay: float, grad_norm: Tensor | float) -> None:
        """Replace each average a by decay * a + (1 - decay) * w, where w is the current value of the master.

        If the gradient norm is not finite, the averages do not change. On a GPU, this method does not wait until the
        norm is computed.
        """
        if isinstance(grad_norm, Tensor) and grad_norm.is_cuda:
            weight = torch.where(torch.isfinite(grad_norm), 1.0 - decay, 0.0).float()
            for average, master in self._elements():
                average.lerp_(master, weight)
        elif math.isfinite(grad_norm):
            averages, masters = zip(*self._elements(), strict=True)
            torch._foreach_lerp_(averages, masters, 1.0 - decay)

    @torch.no_grad()
    def swap(self) -> None:
        """Swap the values of each master and its average, bit for bit."""
        for average, master in self._elements():
            pieces = (torch.split(tensor, _SWAPPED_ELEMENTS) for tensor in (average, master))
            for piece, piece_of_master in zip(*pieces, strict=True):
                kept = piece_of_master.clone()
                piece_of_master.copy_(piece)
                piece.copy_(kept)

    def _elements(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the elements of each average and of its master on this rank."""
        return ((local_elements(self.of(master)), local_elements(master)) for master in self.masters)
