"""Train one long run at a constant learning rate, and one branch from each milestone. Compare the branches in a table.

A milestone is a step of the long run. A branch starts at a milestone, and its learning rate decays.

Each training run is a separate process of launch/train.py. If the command is interrupted, repeat it: finished runs are
skipped, and an interrupted run continues.
"""

import math
from pathlib import Path

from launch.cli import ArgumentParser, add_config_options, positive_int, run_command, start_logging
from launch.run import add_processes_option, train
from pipeline.checkpoint.layout import list_checkpoints, step_of
from pipeline.config.loading import load_config
from pipeline.errors import ConfigError
from pipeline.report.ladder import Branch, write_ladder

STABLE_RUN = "stable"


def main() -> None:
    """Train the long run and all branches. Then write and print the table that compares the branches."""
    arguments = build_parser().parse_args()
    start_logging()
    milestones = sorted(set(arguments.milestones))
    branches = [Branch(step, step + (arguments.decay_steps or math.ceil(step / 4))) for step in milestones]
    config = load_config(arguments.config, arguments.set, arguments.deepspeed)
    if "validation" not in config.evaluation.tasks:
        raise ConfigError("evaluation.tasks: a ladder compares validation losses; add validation")
    if milestones[0] < config.schedule.warmup_steps:
        raise ConfigError(
            f"--milestones {milestones[0]}: the warm-up takes schedule.warmup_steps {config.schedule.warmup_steps} "
            "steps; name later steps, or lower schedule.warmup_steps"
        )
    stable = arguments.out / STABLE_RUN
    if not _has_step(stable, milestones[-1]):
        constant = ["schedule.name=constant", "schedule.decay_steps=null", "schedule.decay_shape=null"]
        kept = f"checkpoint.keep_every_steps={math.gcd(*milestones)}"
        train(arguments, [f"run.out_dir={stable}", f"schedule.max_steps={milestones[-1]}", *constant, kept])
    for branch in branches:
        folder = arguments.out / branch.name
        if not _has_step(folder, branch.stop):
            start = ["--init-from", str(stable), "--at-step", str(branch.milestone), "--branch"]
            decay = ["schedule.name=wsd", f"schedule.max_steps={branch.stop}"]
            decay += [f"schedule.decay_steps={branch.stop - branch.milestone}", "checkpoint.keep_every_steps=null"]
            train(arguments, [f"run.out_dir={folder}", *decay], start)
    table, files = write_ladder(arguments.out, stable, branches)
    print(f"\n{table}\nwrote {', '.join(map(str, files))}")


def build_parser() -> ArgumentParser:
    """Return the parser of the command line."""
    parser = ArgumentParser(
        description=__doc__,
        example="python launch/ladder.py --config ds_configs/ddp.json ds_configs/quickstart.json --milestones 60 120 "
        "--out runs/ladder",
    )
    add_config_options(parser)
    add_processes_option(parser)
    parser.add_argument(
        "--milestones",
        nargs="+",
        required=True,
        type=positive_int,
        metavar="N",
        help="steps of the long run at which a decay begins",
    )
    parser.add_argument(
        "--decay-steps",
        type=positive_int,
        metavar="N",
        help="steps of each decay (default: a quarter of the milestone, so the decay is a fifth of its run)",
    )
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder for all runs and for the table")
    return parser


def _has_step(run_folder: Path, step: int) -> bool:
    """Return whether a run has reached a step and saved it."""
    return any(step_of(folder) >= step for folder in list_checkpoints(run_folder))


if __name__ == "__main__":
    run_command(main)
