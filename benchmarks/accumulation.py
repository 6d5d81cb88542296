"""Does the way a batch is cut matter? One batch in tokens, cut into micro-batches and ranks in six ways.

python -m benchmarks.accumulation      # what `make accumulation` runs
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.parity import GRAD_NORM_TOLERANCE, LOSS_TOLERANCE
from benchmarks.runs import REPOSITORY, TINY_RUN, TRAIN, Curve, curve_of, make_corpus, merged

MASKED_TRAIN = REPOSITORY / "benchmarks" / "masked_train.py"
MICRO_BATCHES = (1, 2, 4)
PROCESSES = (1, 2)


@dataclass(frozen=True)
class AccumulationRow:
    """One way to cut the batch against micro-batches of one sequence in one process."""

    targets: str
    backend: str
    micro_batch_size: int
    processes: int
    loss_difference: float
    grad_norm_difference: float

    @property
    def agrees(self) -> bool:
        """Whether the differences are within the parity tolerance of fp32."""
        return self.loss_difference <= LOSS_TOLERANCE["fp32"] and self.grad_norm_difference <= GRAD_NORM_TOLERANCE


def compare(
    data: Path, scratch: Path, *, masked: bool, steps: int, backends: Sequence[str] = ("ddp",)
) -> Iterator[AccumulationRow]:
    """Train with each cut; yields a row a run."""

    def curve(backend: str, micro_batch_size: int, processes: int) -> Curve:
        sections = merged(
            TINY_RUN,
            {
                "data": {"path": str(data)},
                "batch": {"micro_batch_size": micro_batch_size},
                "schedule": {"max_steps": steps},
            },
        )
        folder = scratch / f"{backend}-{micro_batch_size}-{processes}-{masked}"
        return curve_of(backend, folder, sections, processes, MASKED_TRAIN if masked else TRAIN)

    reference = curve("ddp", 1, 1)
    for backend in backends:
        for micro_batch_size in MICRO_BATCHES:
            for processes in PROCESSES:
                if (backend, micro_batch_size, processes) == ("ddp", 1, 1):
                    continue
                other = curve(backend, micro_batch_size, processes)
                yield AccumulationRow(
                    "masked" if masked else "all",
                    backend,
                    micro_batch_size,
                    processes,
                    other.largest_loss_difference(reference),
                    other.largest_grad_norm_difference(reference),
                )


def main() -> None:
    """Print the table; a non-zero status if a run does not agree."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--backends", nargs="+", default=["ddp", "fsdp", "zero1"])
    arguments = parser.parse_args()
    failures = 0
    print(
        "| targets | backend | micro-batch | processes | largest loss difference | largest norm difference | agrees |"
    )
    print("|---|---|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        data = make_corpus(Path(scratch) / "data")
        for masked in (False, True):
            for row in compare(data, Path(scratch), masked=masked, steps=arguments.steps, backends=arguments.backends):
                failures += not row.agrees
                verdict = "yes" if row.agrees else "NO"
                print(
                    f"| {row.targets} | {row.backend} | {row.micro_batch_size} | {row.processes} "
                    f"| {row.loss_difference:.1e} | {row.grad_norm_difference:.1e} | {verdict} |",
                    flush=True,
                )
    raise SystemExit(f"{failures} runs do not agree" if failures else 0)


if __name__ == "__main__":
    main()
