"""Kill the tokenize command with SIGKILL at random moments, and repeat it until it is complete.

The shards must equal those of an uninterrupted command.

python -m benchmarks.chaos_data       # what `make chaos-data` runs
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.data import write_inputs
from data_tools.shards.manifest import MANIFEST_NAME
from tests.support.runs import REPOSITORY

_TOKENIZE = str(REPOSITORY / "launch" / "tokenize_corpus.py")


@dataclass
class Outcome:
    kills: list[tuple[float, int]] = field(default_factory=list)  # seconds after the start, finished shards by then
    problems: list[str] = field(default_factory=list)  # differences from an uninterrupted run

    def __str__(self) -> str:
        history = ", ".join(f"{at:.2f} s ({kept} shards kept)" for at, kept in self.kills)
        verdict = "; ".join(self.problems) or "same bytes, finished shards untouched"
        return f"killed at {history or 'no moment'}: {verdict}"


def start(source: Path, out: Path) -> subprocess.Popen[bytes]:
    arguments = ["--source", "jsonl", "--input", str(source), "--out", str(out)]
    return subprocess.Popen(
        [sys.executable, _TOKENIZE, *arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )


def run_to_the_end(source: Path, out: Path) -> float:
    started = time.monotonic()
    process = start(source, out)
    _, errors = process.communicate()
    if process.returncode:
        raise SystemExit(f"{out}: the command failed: {errors.decode()}")
    return time.monotonic() - started


def hashes_of(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of every file. The manifest is left out, because it contains the time."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST_NAME)
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


State = tuple[int, int]  # inode and modification time in ns


def finished_shards(out: Path) -> dict[Path, State]:
    """Return the state of each finished shard, by path. The shards are listed in the manifest, or in the records."""
    manifest = out / MANIFEST_NAME
    records = [manifest] if manifest.exists() else list(out.glob("tasks/*.json"))
    shards = [shard for record in records for shard in json.loads(record.read_bytes())["shards"]]
    return states([out / shard["file"] for shard in shards])


def states(paths: Iterable[Path]) -> dict[Path, State]:
    """Return the state of each file. A file with an unchanged state was not written again."""
    return {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in paths}


def interrupt(source: Path, out: Path, moments: list[float], whole: dict[str, str]) -> Outcome:
    """Run the command once per moment, and kill it at that moment. Then run it to its end and compare with ``whole``.

    Args:
        moments: the seconds between the start of the command and its kill.
    """
    outcome = Outcome()
    kept: dict[Path, State] = {}
    for moment in moments:
        process = start(source, out)
        try:
            process.wait(moment)
            break  # the command ended before the kill
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
        if states(kept) != kept:
            outcome.problems.append("a finished shard was written again")
        kept = finished_shards(out)
        outcome.kills.append((moment, len(kept)))
    run_to_the_end(source, out)
    if hashes_of(out) != whole:
        outcome.problems.append("other bytes or additional files")
    if states(kept) != kept:
        outcome.problems.append("a finished shard was written again")
    return outcome


def main() -> None:
    """Exit with a non-zero status if a folder has a problem."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=10, help="kills in all (default: %(default)s)")
    parser.add_argument("--kills-per-folder", type=int, default=3, help="at most (default: %(default)s)")
    parser.add_argument("--megabytes", type=float, default=100, help="size of the documents (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments (default: %(default)s)")
    arguments = parser.parse_args()
    drawn = random.Random(arguments.seed)
    outcomes: list[Outcome] = []
    left = arguments.kills
    with tempfile.TemporaryDirectory() as scratch:
        source = write_inputs(Path(scratch), arguments.megabytes)["jsonl"]
        seconds = run_to_the_end(source, Path(scratch, "whole"))
        whole = hashes_of(Path(scratch, "whole"))
        print(f"{arguments.megabytes:.0f} MB, {len(whole)} shards, {seconds:.1f} s without a kill", flush=True)
        while left > 0:
            moments = [drawn.uniform(0, seconds) for _ in range(min(arguments.kills_per_folder, left))]
            outcomes.append(interrupt(source, Path(scratch, f"out{len(outcomes)}"), moments, whole))
            print(outcomes[-1], flush=True)
            left -= len(outcomes[-1].kills)
    problems = sum(len(outcome.problems) for outcome in outcomes)
    print(f"{arguments.kills - left} kills, {problems} problems")
    raise SystemExit(1 if problems else 0)


if __name__ == "__main__":
    main()
