"""Whether two curves are the same, and the tables that say so."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from tests.support.runs import Curve

#: precision -> largest |loss difference| in nats that counts as agreement
LOSS_TOLERANCE = {"fp32": 5e-6, "amp_bf16": 5e-3, "amp_fp16": 5e-3, "bf16": 5e-3}
GRAD_NORM_TOLERANCE = 1e-4  # relative, fp32 only


@dataclass(frozen=True)
class Agreement:
    """One run against its reference."""

    run: tuple[str, ...]  # what distinguishes it: the first cells of its row
    precision: str
    loss_difference: float  # largest over all steps, nats
    grad_norm_difference: float  # largest over all steps, relative

    @classmethod
    def of(cls, run: tuple[object, ...], precision: str, curve: Curve, reference: Curve) -> Agreement:
        """Compare step by step."""
        return cls(
            tuple(map(str, run)),
            precision,
            curve.largest_loss_difference(reference),
            curve.largest_grad_norm_difference(reference),
        )

    @property
    def agrees(self) -> bool:
        """Whether the differences are within tolerance."""
        norm_agrees = self.precision != "fp32" or self.grad_norm_difference <= GRAD_NORM_TOLERANCE
        return self.loss_difference <= LOSS_TOLERANCE[self.precision] and norm_agrees


def print_table(columns: Sequence[str], rows: Iterable[Agreement]) -> int:
    """Print a Markdown table, each row as soon as its run is over; returns how many do not agree."""
    failures = 0
    _print_row([*columns, "largest loss difference", "largest relative norm difference", "agrees"])
    _print_row(["---"] * (len(columns) + 3))
    for row in rows:
        failures += not row.agrees
        verdict = "yes" if row.agrees else "NO"
        _print_row([*row.run, f"{row.loss_difference:.1e}", f"{row.grad_norm_difference:.1e}", verdict])
    return failures


def _print_row(cells: Sequence[str]) -> None:
    print(f"| {' | '.join(cells)} |", flush=True)
