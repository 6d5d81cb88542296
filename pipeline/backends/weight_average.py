"""Keep an exponential moving average (EMA) of the master weights, which the optimizer updates."""

import math
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from pipeline.backends.ranges import local_elements

_SWAPPED_ELEMENTS = 1 << 22  # 16 MiB, the temporary memory of ``swap``


class WeightAverage:
    """The fp32 moving averages of this rank's masters (tensors that the optimizer updates).

    An average is created at its first use, as a copy of its master.
    """

    def __init__(self, masters: Iterable[Tensor]) -> None:
        self.masters = list(masters)
        self._averages: dict[int, Tensor] = {}  # id(master) -> average

    def of(self, master: Tensor) -> Tensor:
        """Return the moving average of a master. The average and the master have the same shape and sharding."""
        if id(master) not in self._averages:
            self._averages[id(master)] = master.detach().clone()
        return self._averages[id(master)]

    def create(self) -> None:
        """Create missing averages as copies of the masters. Call this before the first update of the masters."""
        for master in self.masters:
            self.of(master)

    @torch.no_grad()
    def update(self, decay: float, grad_norm: Tensor | float) -> None:
        """Set each average to ``decay * average + (1 - decay) * master``.

        If the gradient norm is not finite, nothing changes. If the norm is on a GPU, the host does not wait for it.
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
        """Swap the values of each master weight and its average, without rounding."""
        for average, master in self._elements():
            pieces = (torch.split(tensor, _SWAPPED_ELEMENTS) for tensor in (average, master))
            for piece, piece_of_master in zip(*pieces, strict=True):
                kept = piece_of_master.clone()
                piece_of_master.copy_(piece)
                piece.copy_(kept)

    def _elements(self) -> Iterator[tuple[Tensor, Tensor]]:
        return ((local_elements(self.of(master)), local_elements(master)) for master in self.masters)
