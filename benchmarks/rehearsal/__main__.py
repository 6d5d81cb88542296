"""Run the pipeline on several simulated hosts of this machine. Some cases cut off a host or a network link.

python -m benchmarks.rehearsal                     # what `make rehearse` runs
python -m benchmarks.rehearsal --only torchrun-2 killed
"""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from benchmarks.rehearsal.cases import CASES, Rehearsal, Row
from tests.support.hosts import Lab, NamespacesError
from tests.support.tables import print_header, print_row

COLUMNS = (
    "case",
    "what happens",
    "hosts",
    "launcher",
    "ranks end",
    "launchers end",
    "continues",
    "the run prints",
    "loss difference",
)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=list(CASES), choices=CASES, metavar="CASE", help=", ".join(CASES))
    return parser


def main(argv: Sequence[str] | None = None) -> str | int:
    """Return a message about all problems, or 0 if there are none.

    Raises:
        NamespacesError: this machine does not allow namespaces.
    """
    arguments = build_parser().parse_args(argv)
    signal.signal(signal.SIGTERM, _interrupt)
    problems: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        with Lab(1, scratch / "first"):
            pass  # this machine allows namespaces
        rehearsal = Rehearsal(scratch / "runs")
        print_header(*COLUMNS)
        for name in arguments.only:
            try:
                row = CASES[name](rehearsal)
            except RuntimeError as error:  # a run did not start, continue or end in time
                problems.append(f"{name}: {error}")
                continue
            print_case(name, row)
            problems += [f"{name}: {problem}" for problem in row.problems]
    return "\n".join(problems) or 0


def print_case(name: str, row: Row) -> None:
    times = (
        "" if time is None else f"{time:.0f} s" for time in (row.ranks_end_s, row.launchers_end_s, row.continues_s)
    )
    difference = "" if row.loss_difference is None else f"{row.loss_difference:.1e}"
    print_row(f"`{name}`", row.case, row.hosts, row.launcher, *times, row.cause, difference)


def _interrupt(number: int, _: FrameType | None) -> None:
    """Raise KeyboardInterrupt. Like Ctrl-C, it ends all hosts."""
    raise KeyboardInterrupt(signal.Signals(number).name)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except NamespacesError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("error: interrupted")
