"""Does the backend matter? Curves of every backend at 1 and 2 processes against single-process DDP.

python -m benchmarks.parity            # 60 steps, fp32, amp_bf16 and bf16; what `make parity` runs
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.runs import BACKENDS, TINY_RUN, Curve, curve_of, make_corpus, merged

PROCESSES = (1, 2)

#: precision -> largest |loss difference| in nats that counts as agreement
LOSS_TOLERANCE = {"fp32": 5e-6, "amp_bf16": 5e-3, "amp_fp16": 5e-3, "bf16": 5e-3}
GRAD_NORM_TOLERANCE = 1e-4  # relative, fp32 only


@dataclass(frozen=True)
class ParityRow:
    """One run against the reference."""

    precision: str
    backend: str
    processes: int
    loss_difference: float
    grad_norm_difference: float

    @property
    def agrees(self) -> bool:
        """Whether the differences are within tolerance."""
        norm_agrees = self.precision != "fp32" or self.grad_norm_difference <= GRAD_NORM_TOLERANCE
        return self.loss_difference <= LOSS_TOLERANCE[self.precision] and norm_agrees


def compare(
    data: Path, scratch: Path, precision: str, steps: int, backends: Sequence[str] = BACKENDS
) -> Iterator[ParityRow]:
    """Train each backend at each number of processes; yields a row a run."""

    def curve(backend: str, processes: int) -> Curve:
        sections = merged(
            TINY_RUN,
            {"run": {"precision": precision}, "data": {"path": str(data)}, "schedule": {"max_steps": steps}},
        )
        return curve_of(backend, scratch / f"{precision}-{backend}-{processes}", sections, processes)

    reference = curve("ddp", 1)
    clipped = sum(norm > TINY_RUN["optimizer"]["grad_clip"] for norm in reference.grad_norms)
    assert clipped > steps // 2, "clipping is hardly active: the comparison would prove little"
    for backend in backends:
        for processes in PROCESSES:
            if (backend, processes) == ("ddp", 1):
                continue
            other = curve(backend, processes)
            yield ParityRow(
                precision,
                backend,
                processes,
                other.largest_loss_difference(reference),
                other.largest_grad_norm_difference(reference),
            )


def main() -> None:
    """Print the table; a non-zero status if a run does not agree."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--precisions", nargs="+", default=["fp32", "amp_bf16", "bf16"], choices=LOSS_TOLERANCE)
    arguments = parser.parse_args()
    failures = 0
    print("| precision | backend | processes | largest loss difference | largest relative norm difference | agrees |")
    print("|---|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        data = make_corpus(Path(scratch) / "data")
        for precision in arguments.precisions:
            for row in compare(data, Path(scratch), precision, arguments.steps):
                failures += not row.agrees
                verdict = "yes" if row.agrees else "NO"
                print(
                    f"| {row.precision} | {row.backend} | {row.processes} | {row.loss_difference:.1e} "
                    f"| {row.grad_norm_difference:.1e} | {verdict} |",
                    flush=True,
                )
    raise SystemExit(f"{failures} runs do not agree" if failures else 0)


if __name__ == "__main__":
    main()
