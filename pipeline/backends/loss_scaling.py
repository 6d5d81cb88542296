"""Dynamic loss scaling for fp16, one policy for every backend."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

GROWTH_INTERVAL = 2000  # steps without overflow before the scale doubles (Micikevicius et al. 2018)


@dataclass
class LossScaler:
    """The factor on the loss that keeps small fp16 gradients from vanishing.

    A step whose gradient norm is not finite is skipped and halves the scale; ``GROWTH_INTERVAL`` good steps in a row
    double it. The scale is a power of two, so unscaling is exact. Without ``dynamic`` it stays 1.
    """

    dynamic: bool
    scale: float = 1.0
    good_steps: int = 0

    @classmethod
    def for_precision(cls, precision: str) -> LossScaler:
        """Return a dynamic scale that starts at 2**16 for ``amp_fp16``, and a constant 1 for the others."""
        return cls(dynamic=True, scale=2.0**16) if precision == "amp_fp16" else cls(dynamic=False)

    def update(self, grad_norm: Tensor | float) -> None:
        """Adjust the scale after a step. Only a dynamic scale waits for the device to compute the norm."""
        if not self.dynamic:
            return
        overflowed = not math.isfinite(grad_norm)
        self.good_steps = 0 if overflowed else self.good_steps + 1
        if overflowed:
            self.scale /= 2
        elif self.good_steps == GROWTH_INTERVAL:
            self.scale *= 2
            self.good_steps = 0

    def restore(self, scale: float | None, good_steps: int) -> None:
        """Use the values of a checkpoint, if both it and this precision have a scale (else ``scale`` is None)."""
        if self.dynamic and scale is not None:
            self.scale, self.good_steps = scale, good_steps

    @property
    def state(self) -> tuple[float | None, int]:
        """The arguments of ``restore``."""
        return (self.scale if self.dynamic else None), self.good_steps
