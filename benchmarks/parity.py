"""Compare the curves of every backend with 1 and 2 processes with the curve of single-process DDP.

python -m benchmarks.parity            # 60 steps, fp32, amp_bf16 and bf16; what `make parity` runs
python -m benchmarks.parity --processes 3 4 --bytes    # also with groups of two ranks
python -m benchmarks.parity --compile  # compare compiled runs with the uncompiled reference
python -m benchmarks.parity --bytes --optimizer muon --offload --processes 1 2 4
"""

from __future__ import annotations

import argparse
import math
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.run_options import add_run_options, run_options
from tests.support.agreement import LOSS_TOLERANCE, Agreement, print_table
from tests.support.runs import BACKENDS, GROUPED, TINY_RUN, Curve, Sections, curve_of, merged

PROCESSES = (1, 2)
MICRO_BATCHES = 4  # per step of TINY_RUN


def compare(
    data: Path,
    scratch: Path,
    precisions: Sequence[str],
    steps: int,
    *,
    compiled: bool = False,
    base: Sections = TINY_RUN,
    backends: Sequence[str] = BACKENDS,
    processes: Sequence[int] = PROCESSES,
) -> Iterator[Agreement]:
    """Train each backend with each number of processes. Yields one comparison with the uncompiled reference per run.

    With four or more processes, also train with groups of two ranks (``GROUPED``).
    """
    batch = dict(base["batch"])
    batch["tokens_per_step"] *= math.lcm(MICRO_BATCHES, *processes) // MICRO_BATCHES

    def curve(precision: str, backend: str, ranks: int, compiled: bool) -> Curve:
        sections = merged(
            base,
            {"run": {"precision": precision, "compile": compiled}},
            {"data": {"path": str(data)}, "batch": batch, "schedule": {"max_steps": steps}},
        )
        folder = scratch / f"{precision}-{backend.replace('/', '_')}-{ranks}-{compiled}"
        return curve_of(backend, folder, sections, ranks)

    for precision in precisions:
        reference = curve(precision, "ddp", 1, compiled=False)
        clipped = sum(norm > base["optimizer"]["grad_clip"] for norm in reference.grad_norms)
        assert clipped > steps // 2, "clipping is inactive at most steps: the comparison would prove little"
        for backend in (*backends, *GROUPED):
            for ranks in processes:
                if backend in GROUPED and (ranks < 4 or ranks % 2):
                    continue
                if compiled or (backend, ranks) != ("ddp", 1):
                    run = (precision, backend, ranks)
                    yield Agreement.of(run, precision, curve(*run, compiled=compiled), reference)


def main() -> None:
    """Exit with a non-zero status if a run does not agree with the reference."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--precisions", nargs="+", default=["fp32", "amp_bf16", "bf16"], choices=LOSS_TOLERANCE)
    parser.add_argument("--compile", action="store_true", help="compile all runs except the reference")
    parser.add_argument("--processes", type=int, nargs="+", default=list(PROCESSES))
    add_run_options(parser)
    arguments = parser.parse_args()
    options = run_options(arguments)
    with tempfile.TemporaryDirectory() as scratch:
        data = options.make_corpus(Path(scratch) / "data")
        rows = compare(
            data,
            Path(scratch),
            arguments.precisions,
            arguments.steps,
            compiled=arguments.compile,
            base=options.base,
            backends=options.backends,
            processes=arguments.processes,
        )
        failures = print_table(("precision", "backend", "processes"), rows)
    raise SystemExit(f"{failures} runs do not agree" if failures else 0)


if __name__ == "__main__":
    main()
