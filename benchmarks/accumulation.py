"""Compare the loss curves of runs that divide the same batch into micro-batches and among ranks in six ways.

python -m benchmarks.accumulation                                                    # what `make accumulation` runs
python -m benchmarks.accumulation --bytes --backends fsdp/2 zero3/2 --processes 2 4  # groups of two ranks
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.run_options import add_run_options, run_options
from tests.support.agreement import Agreement, print_table
from tests.support.runs import TINY_RUN, Curve, Sections, copy_with_masks, curve_of, merged

MICRO_BATCHES = (1, 2, 4)
PROCESSES = (1, 2)


def compare(
    data: Path,
    scratch: Path,
    *,
    masked: bool,
    steps: int,
    backends: Sequence[str] = ("ddp",),
    processes: Sequence[int] = PROCESSES,
    base: Sections = TINY_RUN,
) -> Iterator[Agreement]:
    """Train ``base`` in fp32 with each division of the batch. Yields one comparison per run."""
    if masked:
        data = copy_with_masks(data, scratch / "masked_data")

    def curve(backend: str, micro_batch_size: int, ranks: int) -> Curve:
        sections = merged(
            base,
            {
                "data": {"path": str(data)},
                "batch": {"micro_batch_size": micro_batch_size},
                "schedule": {"max_steps": steps},
            },
        )
        folder = scratch / f"{backend}-{micro_batch_size}-{ranks}-{masked}".replace("/", "_")
        return curve_of(backend, folder, sections, ranks)

    reference = curve("ddp", 1, 1)
    sequences = base["batch"]["tokens_per_step"] // base["model"]["context_length"]
    for backend in backends:
        for micro_batch_size in MICRO_BATCHES:
            for ranks in processes:
                run = (backend, micro_batch_size, ranks)
                if sequences % (micro_batch_size * ranks) == 0 and run != ("ddp", 1, 1):
                    yield Agreement.of(("masked" if masked else "all", *run), "fp32", curve(*run), reference)


def main() -> None:
    """Exit with a non-zero status if a run does not agree with the reference."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--processes", type=int, nargs="+", default=list(PROCESSES))
    add_run_options(parser, backends=("ddp", "fsdp", "zero1"))
    arguments = parser.parse_args()
    options = run_options(arguments)
    failures = 0
    with tempfile.TemporaryDirectory() as scratch:
        data = options.make_corpus(Path(scratch) / "data")
        for masked in (False, True):
            rows = compare(
                data,
                Path(scratch),
                masked=masked,
                steps=arguments.steps,
                backends=options.backends,
                processes=arguments.processes,
                base=options.base,
            )
            failures += print_table(("targets", "backend", "micro-batch", "processes"), rows)
            print()
    raise SystemExit(f"{failures} runs do not agree" if failures else 0)


if __name__ == "__main__":
    main()
