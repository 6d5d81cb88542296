"""Complete prompts with a trained model."""

import argparse
import sys
from functools import partial

from launch.cli import (
    ArgumentParser,
    add_checkpoint_options,
    non_empty_text,
    non_negative_float,
    positive_int,
    probability,
    run_command,
    start_logging,
)
from pipeline.config.schema import RunConfig, SampleConfig
from pipeline.distributed.world import join_world
from pipeline.generation.writer import DTYPES, load_writer, prompt_loop

DEFAULTS = SampleConfig()

#: Options of the config section ``sample``: their types, metavars and descriptions.
SAMPLING_OPTIONS = {
    "max_new_tokens": (positive_int, "N", "tokens per completion (default: %(default)s)"),
    "temperature": (non_negative_float, "T", "divides the logits; 0 takes the likeliest token (default: %(default)s)"),
    "top_k": (positive_int, "K", "draw from the K likeliest tokens (default: %(default)s)"),
    "top_p": (probability, "P", "draw from the likeliest tokens that together reach this probability (default: all)"),
}


def main() -> None:
    """Load the model, and complete the prompts of the command line or the terminal."""
    arguments = parse_arguments()
    start_logging()
    sampling = {key: getattr(arguments, key) for key in SAMPLING_OPTIONS}
    sample = SampleConfig(**sampling, stop=arguments.stop)
    with join_world(RunConfig(device=arguments.device), process_group=False) as world:
        writer = load_writer(arguments.checkpoint, world.device, arguments.precision)
        prompts = arguments.prompt or [sample.prompt]
        if arguments.interactive:
            ask = partial(input, "> " if sys.stdin.isatty() else "")
            prompt_loop(writer, sample, arguments.seed, ask, _show)
        elif len(prompts) == 1:
            _show(prompts[0])
            for piece in writer.stream(prompts[0], sample, arguments.seed):
                _show(piece)
            _show("\n")
        else:
            for number, text in enumerate(writer.complete(prompts, sample, arguments.seed)):
                _show(f"== {number + 1}/{len(prompts)}\n{prompts[number]}{text}\n")


def parse_arguments() -> argparse.Namespace:
    """Return the options of the command line."""
    parser = ArgumentParser(
        description=__doc__, example='python launch/generate.py --checkpoint runs/ddp --prompt "The meaning of life is"'
    )
    add_checkpoint_options(parser)
    parser.add_argument(
        "--prompt",
        action="append",
        type=non_empty_text,
        metavar="TEXT",
        help=f"the text to continue; may be given several times (default: {DEFAULTS.prompt})",
    )
    parser.add_argument(
        "--interactive", action="store_true", help="ask for prompts; Ctrl-C stops a completion, Ctrl-D ends the program"
    )
    for key, (parse, metavar, description) in SAMPLING_OPTIONS.items():
        option = "--" + key.replace("_", "-")
        parser.add_argument(option, type=parse, default=getattr(DEFAULTS, key), metavar=metavar, help=description)
    parser.add_argument(
        "--stop",
        action="append",
        type=non_empty_text,
        default=[],
        metavar="TEXT",
        help="stop before this text; may be given several times",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the random draws (default: %(default)s)")
    parser.add_argument(
        "--precision", choices=list(DTYPES), default="fp32", help="dtype of weights and products (default: %(default)s)"
    )
    arguments = parser.parse_args()
    if arguments.interactive and arguments.prompt:
        parser.error("--prompt: with --interactive prompts come from the terminal; give only one of the two")
    return arguments


def _show(text: str) -> None:
    print(text, end="", flush=True)


if __name__ == "__main__":
    run_command(main)
