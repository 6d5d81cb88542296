"""Dynamic loss scaling for fp16, one policy for every backend."""

from __future__ import annotations

from dataclasses import dataclass

GROWTH_INTERVAL = 2000  # steps without overflow before the scale doubles (Micikevicius et al. 2018)


@dataclass
class LossScaler:
    """The factor on the loss that keeps small fp16 gradients from vanishing.

    A step whose gradient norm is not finite is skipped and halves the scale; ``GROWTH_INTERVAL``
    good steps in a row double it. Powers of two, so unscaling is exact. With ``dynamic=False`` the
    scale stays 1 (precisions other than fp16).
    """

    dynamic: bool
    scale: float = 1.0
    good_steps: int = 0

    @classmethod
    def for_precision(cls, precision: str) -> LossScaler:
        """Scaling from 2**16 for ``amp_fp16``, none for the others."""
        return cls(dynamic=True, scale=2.0**16) if precision == "amp_fp16" else cls(dynamic=False)

    def update(self, *, overflowed: bool) -> None:
        """Learn from one step."""
        if not self.dynamic:
            return
        self.good_steps = 0 if overflowed else self.good_steps + 1
        if overflowed:
            self.scale /= 2
        elif self.good_steps == GROWTH_INTERVAL:
            self.scale *= 2
            self.good_steps = 0
