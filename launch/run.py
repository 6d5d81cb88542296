"""All stages of one config: tokenize, train, evaluate, sample. Finished stages are skipped.

Each stage is the command that a person would give, in a process of its own.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from launch.cli import ArgumentParser, add_config_options, positive_int, run_command
from pipeline.config.loading import load_config
from pipeline.config.schema import Config
from pipeline.evaluation.results import find_results, format_table

LAUNCH = Path(__file__).resolve().parent


def main() -> None:
    """Parse, load the config, run what is missing."""
    arguments = parse_arguments()
    config = load_config(arguments.config, arguments.set)
    tokenize(config)
    train(arguments)
    evaluate(config)
    sample(config)


def parse_arguments() -> argparse.Namespace:
    """``--config``, ``--set`` and the number of processes."""
    parser = ArgumentParser(
        description=__doc__, example="python launch/run.py --config ds_configs/ddp.json ds_configs/quickstart.json"
    )
    add_config_options(parser)
    parser.add_argument(
        "--processes", type=positive_int, default=1, metavar="N", help="training processes on this machine (default: 1)"
    )
    return parser.parse_args()


def tokenize(config: Config) -> None:
    """Stage 1, into ``data.path``; the command itself knows whether that is complete. A mixture is of finished ones."""
    if config.data.path is None:
        print("\n== tokenize: nothing to do, data.mixture names finished data sets", flush=True)
        return
    options = []
    for key, value in config.tokenize.model_dump(exclude={"input"}, exclude_none=True).items():
        options += [f"--{key.replace('_', '-')}", str(value)]
    if config.tokenize.input:
        options += ["--input", *config.tokenize.input]
    run_stage("tokenize", [sys.executable], "tokenize_corpus.py", [*options, "--out", config.data.path])


def train(arguments: argparse.Namespace) -> None:
    """Stage 2; the command itself continues a run, or finds it finished."""
    launcher = [sys.executable]
    if arguments.processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={arguments.processes}"]
    overrides = ["--set", *arguments.set] if arguments.set else []
    run_stage("train", launcher, "train.py", ["--config", *arguments.config, *overrides])


def evaluate(config: Config) -> None:
    """Stage 3, the tasks of ``evaluation.tasks`` on the last checkpoint."""
    results = find_results(Path(config.run.out_dir), config.evaluation.tasks, config.schedule.max_steps)
    if results is not None:
        print(f"\n== evaluate: done before\n{format_table(results)}", flush=True)
        return
    options = ["--checkpoint", config.run.out_dir, "--tasks", *config.evaluation.tasks, "--device", config.run.device]
    run_stage("evaluate", [sys.executable], "evaluate.py", options)


def sample(config: Config) -> None:
    """Let the model speak."""
    options = [
        f"--{key.replace('_', '-')}={value}"
        for key, value in config.sample.model_dump(exclude_none=True, exclude={"stop"}).items()
    ]
    options += [f"--stop={text}" for text in config.sample.stop]
    options += ["--checkpoint", config.run.out_dir, "--seed", str(config.run.seed), "--device", config.run.device]
    run_stage("sample", [sys.executable], "generate.py", options)


def run_stage(stage: str, launcher: list[str], script: str, options: list[str]) -> None:
    """Run one command; a failing one has said why, and ends this one with its status."""
    print(f"\n== {stage}", flush=True)
    status = subprocess.run([*launcher, str(LAUNCH / script), *options]).returncode
    if status:
        sys.exit(status)


if __name__ == "__main__":
    run_command(main)
