"""Compare curves within tolerances, and print the comparisons as a table."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from tests.support.runs import Curve
from tests.support.tables import print_header, print_row

#: Precision -> largest absolute loss difference, in nats, that counts as agreement.
LOSS_TOLERANCE = {"fp32": 5e-6, "amp_bf16": 5e-3, "amp_fp16": 5e-3, "bf16": 5e-3}

#: Largest relative difference in gradient norm that counts as agreement, in fp32 only.
GRAD_NORM_TOLERANCE = 1e-4


@dataclass(frozen=True)
class Agreement:
    """The largest differences between a run and its reference."""

    run: tuple[str, ...]  # the first cells of its table row
    precision: str
    loss_difference: float  # largest over all steps, nats
    grad_norm_difference: float  # largest over all steps, relative

    @classmethod
    def of(cls, run: tuple[object, ...], precision: str, curve: Curve, reference: Curve) -> Agreement:
        return cls(
            tuple(map(str, run)),
            precision,
            curve.largest_loss_difference(reference),
            curve.largest_grad_norm_difference(reference),
        )

    @property
    def agrees(self) -> bool:
        norm_agrees = self.precision != "fp32" or self.grad_norm_difference <= GRAD_NORM_TOLERANCE
        return self.loss_difference <= LOSS_TOLERANCE[self.precision] and norm_agrees


def print_table(columns: Sequence[str], rows: Iterable[Agreement]) -> int:
    """Print each comparison as soon as its run has ended. Return the number of runs that do not agree."""
    failures = 0
    print_header(*columns, "largest loss difference", "largest relative norm difference", "agrees")
    for row in rows:
        failures += not row.agrees
        verdict = "yes" if row.agrees else "NO"
        print_row(*row.run, f"{row.loss_difference:.1e}", f"{row.grad_norm_difference:.1e}", verdict)
    return failures
