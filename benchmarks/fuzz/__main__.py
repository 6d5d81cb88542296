"""Run commands on damaged inputs of every kind, and list the commands that ended in a wrong way.

python -m benchmarks.fuzz                        # what `make fuzz` runs: 2,000 damaged inputs of all groups
python -m benchmarks.fuzz parquet npy --inputs 500
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter

from benchmarks.fuzz.groups import GROUPS
from benchmarks.fuzz.isolation import run_group


def main() -> int:
    """Return 0 if all commands ended with success or with one error line, otherwise 1."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("groups", nargs="*", metavar="GROUP", help=f"{', '.join(GROUPS)} (default: all)")
    parser.add_argument(
        "--inputs", type=int, default=2000, help="total number of damaged inputs (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="the seed of the random damage (default: %(default)s)")
    parser.add_argument("--show-errors", action="store_true", help="print every error line")
    arguments = parser.parse_args()
    names = arguments.groups or list(GROUPS)
    if unknown := sorted(set(names) - set(GROUPS)):
        parser.error(f"no group {unknown[0]}; there are {', '.join(GROUPS)}")
    per_group = -(-arguments.inputs // len(names))
    problems = []
    print(f"{'group':<16}{'inputs':>8}{'commands':>10}{'succeeded':>11}{'one error':>11}{'problems':>10}{'s':>8}")
    for name in names:
        started = time.monotonic()
        counts: Counter[str] = Counter()
        for trial in run_group(name, per_group, arguments.seed):
            counts["problems" if trial.problem else "one error" if trial.status else "succeeded"] += 1
            if trial.problem:
                problems.append(trial)
                print(trial, file=sys.stderr, flush=True)
            elif trial.status and arguments.show_errors:
                print(trial, file=sys.stderr, flush=True)
        cells = (counts["succeeded"], counts["one error"], counts["problems"])
        row = f"{name:<16}{per_group:>8,}{sum(cells):>10,}{cells[0]:>11,}{cells[1]:>11,}{cells[2]:>10,}"
        print(f"{row}{time.monotonic() - started:>8.0f}", flush=True)
    print(f"{len(problems)} commands did not end with success or one error line")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
