"""Stage 2: train a run. Start it with python for one process, and with torchrun or deepspeed for several."""

import json

from launch.cli import ArgumentParser, add_config_options, positive_int, run_command, start_logging
from pipeline.config.loading import load_config


def main() -> object:
    """Parse the arguments, load the config, and train. Returns the trainer, which ``run_command`` keeps in memory."""
    parser = ArgumentParser(
        description=__doc__,
        example="torchrun --nproc_per_node=2 launch/train.py --config ds_configs/fsdp.json --set run.out_dir=runs/a",
    )
    add_config_options(parser)
    parser.add_argument(
        "--resume",
        metavar="auto|none|PATH",
        help="the checkpoint to resume from; short for --set checkpoint.resume=... (default: auto)",
    )
    parser.add_argument(
        "--init-from",
        metavar="PATH",
        help="start a new run from the weights of a run, a checkpoint, a Hugging Face folder or a file of nanoGPT; "
        "short for --set checkpoint.init_from=...",
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
    arguments = parser.parse_args()
    overrides = list(arguments.set)
    if arguments.resume is not None:
        overrides.append(f"checkpoint.resume={arguments.resume}")
    if arguments.init_from is not None:
        overrides.append(f"checkpoint.init_from={json.dumps(arguments.init_from)}")
    if arguments.profile is not None:
        overrides.append(f"logging.profile_steps={arguments.profile}")
    config = load_config(arguments.config, overrides, arguments.deepspeed)
    from pipeline.training.run import train  # import torch late so that config errors appear at once

    start_logging()
    return train(config)


if __name__ == "__main__":
    run_command(main)
