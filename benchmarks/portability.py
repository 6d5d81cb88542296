"""Resume from every backend's checkpoint with every other backend and world size. Compare with uninterrupted runs.

python -m benchmarks.portability            # all pairs of backends in fp32 and bf16; what `make portability` runs
python -m benchmarks.portability --optimizer muon --offload --pairs ring
python -m benchmarks.portability --pairs more-ranks    # 1 to 4 processes, 4 to 2, and 2x2 to 3
"""

from __future__ import annotations

import argparse
import math
import os
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from benchmarks.run_options import add_run_options, run_options
from pipeline.checkpoint.layout import checkpoint_folder, list_checkpoints
from tests.support.agreement import LOSS_TOLERANCE
from tests.support.runs import GROUPED, Sections, curve_of, merged, read_curve
from tests.support.tables import print_header, print_row

SAVED_AT, STEPS_AFTER = 10, 30
TOKENS_PER_STEP, MICRO_BATCHES = 192, 4  # multiplied if the number of processes does not divide the micro-batches


@dataclass(frozen=True)
class Side:
    backend: str
    processes: int

    def __str__(self) -> str:
        return f"{self.backend} x{self.processes}"


@dataclass(frozen=True)
class Continuation:
    """A resumed run, compared with an uninterrupted run. A *side* is a backend with a number of processes."""

    saved_by: Side
    continued_by: Side
    precision: str
    loss_difference: float  # the largest difference of the steps after resuming, in nats
    same_bits: bool  # whether the losses, and the weights and moments in the last checkpoint, are identical

    @property
    def agrees(self) -> bool:
        """Return whether the results are identical (on the same side) or within tolerance (on another side)."""
        if self.saved_by == self.continued_by:
            return self.same_bits
        return self.loss_difference <= LOSS_TOLERANCE[self.precision]


class Portability:
    """Trains and continues runs with the config ``base`` in one precision, in the folder ``scratch``."""

    def __init__(
        self, base: Sections, data: Path, scratch: Path, precision: str, tokens_per_step: int = TOKENS_PER_STEP
    ) -> None:
        self.scratch = scratch
        self.precision = precision
        self.sections = merged(
            base,
            {
                "run": {"precision": precision},
                "model": {"dropout": 0.1},
                "data": {"path": str(data)},
                "batch": {"tokens_per_step": tokens_per_step, "micro_batch_size": 1},
                "schedule": {"max_steps": SAVED_AT + STEPS_AFTER},
                "checkpoint": {"every_steps": SAVED_AT, "keep_last": 10},
            },
        )

    def folder(self, *sides: Side) -> Path:
        """Return the run folder of a side's uninterrupted run, or of a continuation."""
        names = (f"{side.backend}{side.processes}".replace("/", "_") for side in sides)
        return self.scratch / "-".join([self.precision, *names])

    def train(self, side: Side) -> None:
        """Train the uninterrupted run, which also saves at ``SAVED_AT``."""
        curve_of(side.backend, self.folder(side), self.sections, side.processes)

    def continue_run(self, saved_by: Side, continued_by: Side) -> Continuation:
        """Resume one side's checkpoint with another side. Compare the run with the first side's uninterrupted run."""
        start: Sections = {"checkpoint": {"resume": str(checkpoint_folder(self.folder(saved_by), SAVED_AT))}}
        folder = self.folder(saved_by, continued_by)
        curve = curve_of(continued_by.backend, folder, merged(self.sections, start), continued_by.processes)
        whole = read_curve(self.folder(saved_by)).after(SAVED_AT)
        assert len(curve.losses) == STEPS_AFTER
        same_bits = curve == whole and last_tensors(folder) == last_tensors(self.folder(saved_by))
        return Continuation(saved_by, continued_by, self.precision, curve.largest_loss_difference(whole), same_bits)


def last_tensors(run_folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in list_checkpoints(run_folder)[-1].glob("*.safetensors")}


def all_pairs(backends: Sequence[str]) -> list[tuple[Side, Side]]:
    """Return all pairs of backends, each twice: with one and then two processes, and with two and then one."""
    return [
        (Side(saved_by, processes), Side(continued_by, 3 - processes))
        for processes, saved_by, continued_by in product((1, 2), backends, backends)
    ]


def ring_of_pairs(backends: Sequence[str]) -> list[tuple[Side, Side]]:
    """Return the pairs of ``all_pairs`` whose second backend follows the first one in ``backends``."""
    following = dict(zip(backends, (*backends[1:], backends[0]), strict=True))
    return [pair for pair in all_pairs(backends) if pair[1].backend == following[pair[0].backend]]


def pairs_of_more_ranks(backends: Sequence[str]) -> list[tuple[Side, Side]]:
    """Return pairs in which one run has four processes. The other run has one, two or three processes."""
    every = (*backends, *GROUPED)
    following = (*every[1:], every[0])
    return [
        *((Side("ddp", 1), Side(backend, 4)) for backend in every),
        *((Side(backend, 4), Side(other, 2)) for backend, other in zip(every, following, strict=True)),
        *((Side("fsdp/2", 4), Side(backend, 3)) for backend in backends),
    ]


PAIRS = {"all": all_pairs, "ring": ring_of_pairs, "more-ranks": pairs_of_more_ranks}


def same_sides(backends: Sequence[str]) -> list[tuple[Side, Side]]:
    return [(Side(backend, processes),) * 2 for processes, backend in product((1, 2), backends)]


def compare(runs: Portability, pairs: Sequence[tuple[Side, Side]]) -> Iterator[Continuation]:
    """Yield one result per pair. Runs with fewer processes than cores are trained in parallel."""
    sources = list(dict.fromkeys(saved_by for saved_by, _ in pairs))
    cores = os.cpu_count() or 1
    with ExitStack() as stack:
        sizes = sorted({side.processes for pair in pairs for side in pair})
        pools = {size: stack.enter_context(ThreadPoolExecutor(max(1, cores // size))) for size in sizes}
        for processes, pool in pools.items():
            list(pool.map(runs.train, [side for side in sources if side.processes == processes]))
        for processes, pool in pools.items():
            chosen = [pair for pair in pairs if pair[1].processes == processes]
            yield from pool.map(lambda pair: runs.continue_run(*pair), chosen)


def print_matrices(results: Sequence[Continuation], backends: Sequence[str]) -> None:
    """Print the largest loss differences. Rows are the side that saved, columns are the side that resumed."""
    for processes in (1, 2):
        print()
        print_header(f"{results[0].precision}: {processes} -> {3 - processes}", *backends)
        for saved_by in backends:
            cells = {
                result.continued_by.backend: f"{result.loss_difference:.1e}"
                for result in results
                if result.saved_by == Side(saved_by, processes) and result.continued_by.processes != processes
            }
            print_row(saved_by, *(cells.get(backend, "") for backend in backends))
    same = [result for result in results if result.saved_by == result.continued_by]
    print(f"\nthe same side continues bit by bit: {sum(result.same_bits for result in same)} of {len(same)}")
    worst = max(result.loss_difference for result in results)
    print(f"largest loss difference of {len(results)} continuations in {results[0].precision}: {worst:.1e}", flush=True)


def main() -> None:
    """Exit with a non-zero status if a continuation does not agree with the uninterrupted run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precisions", nargs="+", default=["fp32", "bf16"], choices=LOSS_TOLERANCE)
    parser.add_argument(
        "--pairs",
        default="all",
        choices=PAIRS,
        help="the backends that save and resume; with `ring`, each backend and the next one; with `more-ranks`, one to "
        "four processes (default: %(default)s)",
    )
    add_run_options(parser, uses_bytes=True)
    arguments = parser.parse_args()
    options = run_options(arguments)
    with_more_ranks = arguments.pairs == "more-ranks"
    pairs = PAIRS[arguments.pairs](options.backends)
    if not with_more_ranks:
        pairs += same_sides(options.backends)
    sizes = {side.processes for pair in pairs for side in pair}
    tokens_per_step = TOKENS_PER_STEP * math.lcm(MICRO_BATCHES, *sizes) // MICRO_BATCHES
    failures = []
    with tempfile.TemporaryDirectory() as scratch:
        data = options.make_corpus(Path(scratch) / "data")
        for precision in arguments.precisions:
            results = []
            runs = Portability(options.base, data, Path(scratch), precision, tokens_per_step)
            for result in compare(runs, pairs):
                print(
                    f"{precision}: {result.saved_by} -> {result.continued_by}: {result.loss_difference:.1e}", flush=True
                )
                results.append(result)
            if not with_more_ranks:
                print_matrices(results, options.backends)
            failures += [result for result in results if not result.agrees]
    for failure in failures:
        print(f"does not agree: {failure}")
    raise SystemExit(1 if failures else 0)


if __name__ == "__main__":
    main()
