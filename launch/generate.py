"""Let a trained model continue a prompt."""

from __future__ import annotations

from launch.cli import (
    ArgumentParser,
    add_checkpoint_options,
    non_negative_float,
    positive_int,
    run_command,
    start_logging,
)
from pipeline.config import RunConfig, SampleConfig
from pipeline.continuation import continue_prompt
from pipeline.distributed import join_world


def main() -> None:
    """Parse, load, print the text."""
    defaults = SampleConfig()
    parser = ArgumentParser(
        description=__doc__, example='python launch/generate.py --checkpoint runs/ddp --prompt "The meaning of life is"'
    )
    add_checkpoint_options(parser)
    parser.add_argument("--prompt", default=defaults.prompt, help="what the model continues (default: %(default)s)")
    parser.add_argument(
        "--max-new-tokens",
        type=positive_int,
        default=defaults.max_new_tokens,
        metavar="N",
        help="(default: %(default)s)",
    )
    parser.add_argument(
        "--temperature",
        type=non_negative_float,
        default=defaults.temperature,
        help="0: the likeliest token each time (default: %(default)s)",
    )
    parser.add_argument(
        "--top-k",
        type=positive_int,
        default=defaults.top_k,
        metavar="K",
        help="draw from the K likeliest (default: %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the draws (default: %(default)s)")
    arguments = parser.parse_args()
    start_logging()
    if not arguments.prompt:
        parser.error("--prompt: an empty prompt has nothing to continue; give at least one character")
    sample = SampleConfig(
        prompt=arguments.prompt,
        max_new_tokens=arguments.max_new_tokens,
        temperature=arguments.temperature,
        top_k=arguments.top_k,
    )
    with join_world(RunConfig(device=arguments.device), process_group=False) as world:
        print(continue_prompt(arguments.checkpoint, sample, arguments.seed, world.device))


if __name__ == "__main__":
    run_command(main)
