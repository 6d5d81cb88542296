"""Stage 2: train a run. Plain python for one process; torchrun or deepspeed for more."""

from __future__ import annotations

from launch.cli import ArgumentParser, add_config_options, positive_int, run_command, start_logging
from pipeline.config.loading import load_config

DEFAULT_PROFILE_STEPS = 3


def main() -> None:
    """Parse, load the config, train."""
    parser = ArgumentParser(
        description=__doc__,
        example="torchrun --nproc_per_node=2 launch/train.py --config ds_configs/fsdp.json --set run.out_dir=runs/a",
    )
    add_config_options(parser)
    parser.add_argument(
        "--resume", metavar="auto|none|PATH", help="the same as --set checkpoint.resume=... (default: auto)"
    )
    parser.add_argument(
        "--profile",
        nargs="?",
        const=DEFAULT_PROFILE_STEPS,
        type=positive_int,
        metavar="STEPS",
        help="trace so many steps into the run folder, a Chrome trace and a table; the same as --set "
        "logging.profile_steps=... (default: %(const)s)",
    )
    parser.add_argument("--local_rank", help="given by the deepspeed launcher; the environment says the same")
    arguments = parser.parse_args()
    resume = [] if arguments.resume is None else [f"checkpoint.resume={arguments.resume}"]
    profile = [] if arguments.profile is None else [f"logging.profile_steps={arguments.profile}"]
    config = load_config(arguments.config, [*arguments.set, *resume, *profile])
    from pipeline.training.run import train  # takes seconds to import torch: a wrong config is refused before

    start_logging()
    train(config)


if __name__ == "__main__":
    run_command(main)
