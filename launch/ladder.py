"""Train one long run at a constant learning rate, and one branch from each milestone. Compare the branches in a table.

A milestone is a step of the long run. A branch starts at a milestone, and its learning rate decays.

If the command is interrupted, repeat it: finished runs are skipped, and an interrupted run continues.
"""

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

from launch.cli import (
    ArgumentParser,
    add_config_options,
    config_options,
    local_path,
    positive_int,
    run_command,
    start_logging,
)
from launch.run import add_processes_option, train
from pipeline.config.loading import keys_of_overrides, load_config
from pipeline.config.schema import Config
from pipeline.errors import ConfigError
from pipeline.report.ladder import Branch, write_ladder
from pipeline.training.ladder import check_long_run, check_milestones, choose_branch_folder, has_step

STABLE_RUN = "stable"
CONSTANT = ["schedule.name=constant", "schedule.decay_steps=null", "schedule.decay_shape=null"]

#: The keys that this command sets for each run, and what a user must do instead of setting them.
OWN_KEYS = {
    "run.out_dir": "name the folder of all runs with --out",
    "schedule.name": "leave it out, the long run is constant and the branches are wsd",
    "schedule.max_steps": "leave it out, --milestones and --decay-steps determine the length of each run",
    "schedule.decay_steps": "give --decay-steps instead",
    "checkpoint.keep_every_steps": "leave it out, the long run keeps all milestones",
    "checkpoint.resume": "leave it out, each run continues from its own newest checkpoint",
}


def main() -> None:
    arguments = build_parser().parse_args()
    start_logging()
    milestones = sorted(set(arguments.milestones))
    stable = arguments.out / STABLE_RUN
    _check_settings(arguments, stable, milestones)
    branches = [_plan_branch(arguments, milestone) for milestone in milestones]
    missing = [branch for branch in branches if not has_step(branch.run, branch.stop)]
    check_milestones(stable, [branch.milestone for branch in missing])
    print(
        "\n== ladder: the long run has schedule.name constant, and each branch has wsd. These keys of the config files "
        f"are not used: {', '.join(OWN_KEYS)}",
        flush=True,
    )
    if not has_step(stable, milestones[-1]):
        kept = f"checkpoint.keep_every_steps={math.gcd(*milestones)}"
        overrides = [f"run.out_dir={stable}", f"schedule.max_steps={milestones[-1]}", *CONSTANT, kept]
        train(config_options(arguments, overrides), processes=arguments.processes)
    for branch in missing:
        overrides = [f"run.out_dir={branch.run}", *_decay(branch.milestone, branch.stop)]
        start = ["--init-from", str(stable), "--at-step", str(branch.milestone), "--branch"]
        train([*config_options(arguments, overrides), *start], processes=arguments.processes)
    table, files = write_ladder(arguments.out, stable, branches)
    print(f"\n{table}\nwrote {', '.join(map(str, files))}")


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(
        description=__doc__,
        example="gpt2-pipeline ladder --config ddp quickstart --milestones 60 120 --out runs/ladder",
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
    parser.add_argument(
        "--out", required=True, type=local_path, metavar="DIR", help="folder for all runs and for the table"
    )
    return parser


def _check_settings(arguments: argparse.Namespace, stable: Path, milestones: Sequence[int]) -> None:
    """Raise ConfigError if this command cannot use the settings or the folder."""
    for key in keys_of_overrides(arguments.set):
        if key in OWN_KEYS:
            raise ConfigError(f"--set {key}: this command sets the key for each run; {OWN_KEYS[key]}")
    config = _load(arguments, CONSTANT)
    if "validation" not in config.evaluation.tasks:
        raise ConfigError("evaluation.tasks: a ladder compares validation losses; add validation")
    for key in ("stop_at_val_loss", "stop_after_evaluations"):
        if getattr(config.schedule, key) is not None:
            raise ConfigError(f"schedule.{key}: every run of a ladder must reach its last step; set the key to null")
    if milestones[0] < config.schedule.warmup_steps:
        raise ConfigError(
            f"--milestones {milestones[0]}: the warm-up takes schedule.warmup_steps {config.schedule.warmup_steps} "
            "steps; name later steps, or lower schedule.warmup_steps"
        )
    check_long_run(stable, config)


def _plan_branch(arguments: argparse.Namespace, milestone: int) -> Branch:
    stop = milestone + (arguments.decay_steps or math.ceil(milestone / 4))
    config = _load(arguments, _decay(milestone, stop))
    return Branch(milestone, stop, choose_branch_folder(arguments.out, milestone, config))


def _decay(milestone: int, stop: int) -> list[str]:
    schedule = ["schedule.name=wsd", f"schedule.max_steps={stop}", f"schedule.decay_steps={stop - milestone}"]
    return [*schedule, "checkpoint.keep_every_steps=null", "checkpoint.init_from=null"]


def _load(arguments: argparse.Namespace, overrides: Sequence[str]) -> Config:
    return load_config(arguments.config, [*arguments.set, *overrides], arguments.deepspeed)


if __name__ == "__main__":
    run_command(main)
