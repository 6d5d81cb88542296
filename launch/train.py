"""Stage 2: train a run. Start it with python for one process, and with torchrun or deepspeed for several."""

import argparse
import json
from pathlib import Path

from launch.cli import ArgumentParser, add_config_options, positive_int, quick_imports, run_command, start_logging
from data_tools.storage.files import is_remote
from pipeline.checkpoint.hashing import find_likely_start, hashing_in_background
from pipeline.checkpoint.layout import checkpoint_of_step, checkpoint_url, split_url
from pipeline.config.loading import load_config
from pipeline.config.schema import Config
from pipeline.errors import ConfigError


def main() -> object:
    """Train, and return the trainer.

    ``run_command`` keeps the trainer alive until the process ends. The process can hang when the trainer is freed.
    """
    arguments = build_parser().parse_args()
    overrides = [*arguments.set, *_start_overrides(arguments)]
    if arguments.profile is not None:
        overrides.append(f"logging.profile_steps={arguments.profile}")
    config = load_config(arguments.config, overrides, arguments.deepspeed)
    if arguments.branch:
        _check_branch(arguments.init_from, config)
    likely_start = find_likely_start(Path(config.run.out_dir), config.checkpoint.resume)
    with hashing_in_background(likely_start) as hash_file:
        with quick_imports():
            from pipeline.training.run import train

        start_logging()
        return train(config, hash_file)


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(
        description=__doc__,
        example="torchrun --standalone --nproc_per_node=2 -m launch.train --config fsdp quickstart",
    )
    add_config_options(parser)
    parser.add_argument(
        "--resume",
        metavar="auto|none|PATH",
        help="the checkpoint to resume from, also a URL such as s3://bucket/run; short for --set "
        "checkpoint.resume=... (default: auto)",
    )
    parser.add_argument(
        "--init-from",
        metavar="PATH",
        help="start a new run from the weights of a run, a checkpoint, a Hugging Face folder or a file of nanoGPT; "
        "short for --set checkpoint.init_from=...",
    )
    parser.add_argument(
        "--at-step",
        type=positive_int,
        metavar="N",
        help="with --init-from or --resume and a run: take its checkpoint of this step instead of the newest",
    )
    parser.add_argument(
        "--branch",
        action="store_true",
        help="with --init-from and a run: also continue its step, optimizer state and data order, in a new run folder "
        "and with the schedule of this command",
    )
    parser.add_argument(
        "--profile",
        nargs="?",
        const=3,
        type=positive_int,
        metavar="STEPS",
        help="write a Chrome trace and a table of this many steps into the run folder; short for --set "
        "logging.profile_steps=... (default: %(const)s steps)",
    )
    parser.add_argument("--local_rank", help="ignored; the deepspeed launcher adds it")
    return parser


def _check_branch(source: str, config: Config) -> None:
    """Raise ConfigError if a branch would write to the folder or the URL of its source run."""
    if Path(config.run.out_dir).resolve() == Path(source).resolve():
        raise ConfigError(
            f"--branch: {source} is the run folder of this command, too; name a new folder for the branch with --set "
            "run.out_dir=DIR"
        )
    remote = config.checkpoint.remote
    if remote is not None and split_url(remote)[0] == split_url(source)[0]:
        raise ConfigError(
            f"--branch: {source} belongs to checkpoint.remote of this command, too; name a new URL for the branch with "
            "--set checkpoint.remote=URL, or set it to null"
        )


def _start_overrides(arguments: argparse.Namespace) -> list[str]:
    """Return the config overrides for where the run starts.

    Raises:
        ConfigError: the options do not fit together.
        CheckpointError: the run has no checkpoint of the step ``--at-step``.
    """
    init_from, resume = arguments.init_from, arguments.resume
    if arguments.branch and (init_from is None or resume is not None):
        raise ConfigError("--branch: name the run to branch off from with --init-from RUN, without --resume")
    if arguments.at_step is not None:
        if init_from is not None:
            init_from = _checkpoint_of(init_from, arguments.at_step)
        else:
            resume = _checkpoint_of(resume, arguments.at_step)
    if arguments.branch:
        return [f"checkpoint.resume={json.dumps(init_from)}", "checkpoint.init_from=null"]
    starts = {"init_from": init_from, "resume": resume}
    return [f"checkpoint.{key}={json.dumps(start)}" for key, start in starts.items() if start is not None]


def _checkpoint_of(run: str | None, step: int) -> str:
    if run is None or run in ("auto", "none"):
        raise ConfigError("--at-step: name the run that has this checkpoint with --init-from RUN or --resume RUN")
    return checkpoint_url(run, step) if is_remote(run) else str(checkpoint_of_step(Path(run), step))


if __name__ == "__main__":
    run_command(main)
