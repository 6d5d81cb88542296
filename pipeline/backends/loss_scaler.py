"""Scale the loss for fp16, so that small gradients do not become zero."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

GROWTH_INTERVAL = 2000  # steps without overflow before the loss scale doubles (Micikevicius et al. 2018)


@dataclass
class LossScaler:
    """The factor for the loss in the backward pass. It prevents small fp16 gradients from becoming zero.

    A step is *good* if its gradient norm is finite. After a step that is not good, a dynamic scale is halved. After
    ``GROWTH_INTERVAL`` good steps in a row, it is doubled. A scale that is not dynamic is always 1.
    """

    dynamic: bool
    scale: float = 1.0
    good_steps: int = 0
    world_size: int = 1

    @classmethod
    def for_precision(cls, precision: str, world_size: int = 1) -> LossScaler:
        """Return a loss scaler. For ``amp_fp16``, the scale is dynamic and starts at 2**16. Otherwise, it is 1."""
        dynamic = precision == "amp_fp16"
        return cls(dynamic=dynamic, scale=2.0**16 if dynamic else 1.0, world_size=world_size)

    @property
    def factor(self) -> float:
        """Return the factor for the loss on each rank. The caller must divide the averaged gradients by this factor.

        A dynamic scale is divided by the world size, because the trainer multiplies the loss by the world size. fp16
        gradients then overflow in the same steps at every world size. If the scale is not dynamic, the factor is 1.
        """
        return self.scale / self.world_size if self.dynamic else 1.0

    def update(self, grad_norm: Tensor | float) -> None:
        """Adjust a dynamic scale after a step. This waits until the device has computed ``grad_norm``."""
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
        """Restore the values that ``state`` returned.

        Do nothing if ``scale`` is None, or if this scaler is not dynamic.
        """
        if self.dynamic and scale is not None:
            self.scale, self.good_steps = scale, good_steps

    @property
    def state(self) -> tuple[float | None, int]:
        """Return the scale, and the number of good steps since the scale last changed.

        If the scale is not dynamic, the first value is None.
        """
        return (self.scale if self.dynamic else None), self.good_steps
