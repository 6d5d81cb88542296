"""Kill runs with SIGKILL at random moments, and resume each run with a random backend and world size.

python -m benchmarks.chaos --runs 60        # what `make chaos` runs
python -m benchmarks.chaos --runs 20 --optimizer muon --bytes
python -m benchmarks.chaos --runs 12 --bytes --backends fsdp/2 zero3/2 --processes 2 4    # groups of two ranks
"""

from __future__ import annotations

import argparse
import random
import re
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from benchmarks.run_options import add_run_options, run_options
from pipeline.checkpoint.layout import list_checkpoints, step_of
from pipeline.checkpoint.verification import find_damage
from pipeline.run_folder.metrics import read_metrics
from tests.support.agreement import LOSS_TOLERANCE
from tests.support.live_run import LiveRun
from tests.support.runs import (
    BACKENDS,
    TINY_RUN,
    Curve,
    Sections,
    curve_of,
    last_logged_step,
    merged,
    read_curve,
)

PROCESSES = (1, 2)
STEPS, EVERY_STEPS = 30, 5
MILESTONE_STEPS = 10  # every milestone must still exist at the end
LONGEST_S = 14.0  # the approximate time from the start of a run to its last step
IN_A_SAVE_S = 0.25  # the approximate duration of a save

_CONTINUES = re.compile(r"^start +(?:continues \S*step_(\d+)|from scratch)", re.MULTILINE)


@dataclass
class Outcome:
    number: int
    history: list[str] = field(default_factory=list)
    kills: int = 0
    # One number per kill: logged steps that were trained again, and saves that were started and lost.
    lost_steps: list[int] = field(default_factory=list)
    lost_saves: list[int] = field(default_factory=list)
    loss_difference: float = 0.0  # the largest difference of any step from the uninterrupted run, in nats
    problems: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        verdict = "; ".join(self.problems) or "ok"
        return f"run {self.number}: {', '.join(self.history)}: difference {self.loss_difference:.1e}, {verdict}"

    def note_continuation(self, output: str, reached: int) -> None:
        """Record from which checkpoint the run resumed. Before it was killed, the run had logged ``reached`` steps."""
        match = _CONTINUES.search(output)
        if not reached or not match:
            return
        continued_from = int(match[1] or 0)
        lost_saves = reached // EVERY_STEPS - continued_from // EVERY_STEPS
        self.lost_steps.append(max(reached - continued_from, 0))
        self.lost_saves.append(lost_saves)
        if lost_saves > 1:
            self.problems.append(f"reached step {reached}, continued from {continued_from}: more than one save lost")

    def check_end(self, folder: Path, reference: Curve) -> None:
        """Compare the finished run with the uninterrupted run, and look for files that should not exist."""
        rows = [row["step"] for row in read_metrics(folder) if "loss" in row]
        if rows != list(range(1, STEPS + 1)):
            self.problems.append(f"logged steps {rows}")
            return
        self.loss_difference = read_curve(folder).largest_loss_difference(reference)
        if self.loss_difference > LOSS_TOLERANCE["fp32"]:
            self.problems.append("the curve differs from that of the uninterrupted run")
        left = [path.name for path in folder.rglob("*") if path.name.endswith((".partial", ".lock", ".tmp"))]
        if left:
            self.problems.append(f"left behind: {left}")
        checkpoints = list_checkpoints(folder)
        milestones = set(range(MILESTONE_STEPS, STEPS + 1, MILESTONE_STEPS))
        if missing := sorted(milestones - set(map(step_of, checkpoints))):
            self.problems.append(f"milestones are missing: {missing}")
        for checkpoint in checkpoints:
            if problem := find_damage(checkpoint):
                self.problems.append(problem)


def sections_of(data: Path, base: Sections = TINY_RUN) -> Sections:
    """Return the config of a run that takes a few seconds and saves every few steps."""
    return merged(
        base,
        {
            "model": {"dropout": 0.1},
            "data": {"path": str(data)},
            "batch": {"tokens_per_step": 192, "micro_batch_size": 1},
            "schedule": {"max_steps": STEPS},
            "checkpoint": {"every_steps": EVERY_STEPS, "keep_last": 1, "keep_every_steps": MILESTONE_STEPS},
        },
    )


def survive(
    number: int,
    seed: int,
    sections: Sections,
    scratch: Path,
    reference: Curve,
    backends: Sequence[str] = BACKENDS,
    processes: Sequence[int] = PROCESSES,
) -> Outcome:
    """Start a run, kill and resume it one to three times, let it finish, and check the result."""
    chance = random.Random(f"{seed}-{number}")
    outcome = Outcome(number)
    folder = scratch / f"run-{number}"
    kills_wanted = chance.choice((1, 1, 2, 3))
    ended = False
    while not ended:
        backend, ranks = chance.choice(backends), chance.choice(processes)
        reached = last_logged_step(folder)
        with LiveRun(backend, folder, sections, ranks) as run:
            killed = outcome.kills < kills_wanted and kill_at_random(run, ranks, chance)
            status = run.wait()
            outcome.note_continuation(run.output, reached)
            outcome.history.append(f"{backend} x{ranks} {killed or 'to the end'}")
            outcome.kills += bool(killed)
            ended = not killed
            if ended and status:
                outcome.problems.append(f"ended with status {status}: {run.output[-2000:]}")
    outcome.check_end(folder, reference)
    return outcome


def kill_at_random(run: LiveRun, processes: int, chance: random.Random) -> str | None:
    """Send SIGKILL to all ranks or to one rank, at a random moment or inside a save.

    Returns a description of the kill, or None if the run had already ended.
    """
    in_a_save, one_rank = chance.random() < 0.4, processes > 1 and chance.random() < 0.4
    save_number, delay_share = chance.randrange(STEPS // EVERY_STEPS), chance.random()
    if in_a_save:
        while run.process.poll() is None and not is_in_save_after(run, save_number * EVERY_STEPS):
            time.sleep(0.002)
    time.sleep(delay_share * (IN_A_SAVE_S if in_a_save else LONGEST_S))
    victim = run.ranks().get(chance.randrange(processes)) if one_rank else None
    if run.process.poll() is not None:
        return None
    if victim is None:
        run.kill()
    else:
        victim.kill()
    whom = "all ranks" if victim is None else f"pid {victim.pid} only"
    return f"killed {whom} {'in a save' if in_a_save else 'at any moment'}, step {run.last_step()}"


def is_in_save_after(run: LiveRun, step: int) -> bool:
    """Return whether a checkpoint of a step after ``step`` is being written now."""
    folders = run.run_folder.glob("checkpoints/.step_*.partial")
    return any(int(folder.name.split("_")[1].split(".")[0]) > step for folder in folders)


def main() -> None:
    """Exit with a non-zero status if a run has a problem."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, nargs="+", default=list(PROCESSES))
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time (default: %(default)s)")
    add_run_options(parser)
    arguments = parser.parse_args()
    options = run_options(arguments)
    outcomes = []
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(arguments.jobs) as pool:
        scratch = Path(folder)
        sections = sections_of(options.make_corpus(scratch / "data"), options.base)
        reference = curve_of("ddp", scratch / "uninterrupted", sections)
        survived = partial(
            survive,
            seed=arguments.seed,
            sections=sections,
            scratch=scratch,
            reference=reference,
            backends=options.backends,
            processes=arguments.processes,
        )
        for outcome in pool.map(survived, range(arguments.runs)):
            print(outcome, flush=True)
            outcomes.append(outcome)
    print_summary(outcomes)
    raise SystemExit(1 if any(outcome.problems for outcome in outcomes) else 0)


def print_summary(outcomes: list[Outcome]) -> None:
    lost = [steps for outcome in outcomes for steps in outcome.lost_steps]
    saves = [count for outcome in outcomes for count in outcome.lost_saves]
    survived = sum(not outcome.problems for outcome in outcomes)
    kills = sum(outcome.kills for outcome in outcomes)
    print(f"\n{survived} of {len(outcomes)} runs ended like the uninterrupted run, after {kills} kills")
    print(f"largest loss difference: {max(outcome.loss_difference for outcome in outcomes):.1e}")
    print(f"saves lost by a kill: at most {max(saves, default=0)}, {sum(count > 0 for count in saves)} kills lost one")
    beyond = sum(steps > EVERY_STEPS for steps in lost)
    print(f"steps lost by a kill: at most {max(lost, default=0)} of an interval of {EVERY_STEPS}; {beyond} lost more")


if __name__ == "__main__":
    main()
