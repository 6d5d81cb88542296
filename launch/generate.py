"""Complete prompts with a trained model."""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Generator, Iterator
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, get_args

from launch.cli import (
    ArgumentParser,
    add_checkpoint_options,
    non_empty_text,
    non_negative_float,
    positive_int,
    probability,
    quick_imports,
    run_command,
    start_logging,
    valid_text,
)
from data_tools.errors import UserError
from pipeline.config.schema import RunConfig, SampleConfig
from pipeline.generation.options import Template, WeightsDtype

if TYPE_CHECKING:
    from pipeline.generation.text_generator import TextGenerator

with suppress(ImportError):  # Windows has no readline
    import readline  # noqa: F401 - input() then edits the line and recalls earlier lines

#: Options of the config section ``sample``: their types, metavars and descriptions.
SAMPLING_OPTIONS = {
    "max_new_tokens": (positive_int, "N", "tokens per completion"),
    "temperature": (non_negative_float, "T", "divides the logits; 0 takes the likeliest token"),
    "top_k": (positive_int, "K", "draw from the K likeliest tokens"),
    "top_p": (probability, "P", "draw from the likeliest tokens that together reach this probability"),
}


def main() -> None:
    arguments = parse_arguments()
    with quick_imports():
        from pipeline.distributed.cpu import share_cores
        from pipeline.distributed.world import join_world
        from pipeline.generation.chat import Chat
        from pipeline.generation.text_generator import load_text_generator, prompt_loop

    start_logging()
    if isinstance(sys.stdin, io.TextIOWrapper) and not sys.stdin.isatty():
        sys.stdin.reconfigure(encoding="utf-8-sig", errors="strict")  # PowerShell writes a byte order mark
    given = {key: getattr(arguments, key) for key in (*SAMPLING_OPTIONS, "stop")}
    run = RunConfig(device=arguments.device)
    with join_world(run, process_group=False, device_option="--device") as world:
        share_cores(world)
        together = 1 if arguments.chat else len(arguments.prompt or [None])
        generator = load_text_generator(
            arguments.checkpoint, world.device, arguments.precision, arguments.weights, together
        )
        sample = generator.sample.model_copy(update={key: value for key, value in given.items() if value is not None})
        prompts = arguments.prompt or [sample.prompt]
        if arguments.chat:
            chat = Chat(generator, sample, arguments.chat, arguments.system)
            prompt_loop(chat.answer, arguments.seed, partial(_next, iter(prompts)) if arguments.prompt else _ask, _show)
        elif arguments.interactive:
            prompt_loop(partial(_continue, generator, sample), arguments.seed, _ask, _show)
        elif len(prompts) == 1:
            for piece in _continue(generator, sample, prompts[0], arguments.seed):
                _show(piece)
            _show("\n")
        else:
            for number, text in enumerate(generator.complete(prompts, sample, arguments.seed)):
                _show(f"== {number + 1}/{len(prompts)}\n{prompts[number]}{text}\n")


def parse_arguments() -> argparse.Namespace:
    parser = build_parser()
    arguments = parser.parse_args()
    if arguments.interactive and arguments.prompt:
        parser.error("--prompt: with --interactive prompts come from the terminal; give only one of the two")
    if arguments.chat and "" in (arguments.prompt or []):
        parser.error("--prompt: a message of a chat must be at least one character")
    if arguments.system and arguments.chat == "instruction":
        parser.error("--system: the template instruction has no system message; leave out --system")
    if arguments.system and not arguments.chat:
        parser.error("--system: only a chat has a system message; add --chat, or leave out --system")
    return arguments


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(
        description=__doc__, example='gpt2-pipeline generate --checkpoint runs/ddp --prompt "The meaning of life is"'
    )
    add_checkpoint_options(parser)
    parser.add_argument(
        "--prompt",
        action="append",
        type=valid_text,
        metavar="TEXT",
        help="the text to continue, or an empty text for a new text; may be given several times (default: the prompt "
        "of the run's section sample)",
    )
    parser.add_argument(
        "--interactive", action="store_true", help="ask for prompts; Ctrl-C stops a completion, Ctrl-D ends the program"
    )
    parser.add_argument(
        "--chat",
        nargs="?",
        choices=get_args(Template),
        const="messages",
        help="hold a conversation, in the layout of --source instructions; the model was trained on chats (messages, "
        "the default) or on single instructions; each --prompt is a message, otherwise the messages are asked for",
    )
    parser.add_argument(
        "--system", type=non_empty_text, metavar="TEXT", help="with --chat messages: the first message, of the system"
    )
    sampling = parser.add_argument_group("sampling", "The defaults are the run's section sample.")
    for key, (parse, metavar, description) in SAMPLING_OPTIONS.items():
        option = "--" + key.replace("_", "-")
        sampling.add_argument(option, type=parse, metavar=metavar, help=description)
    sampling.add_argument(
        "--stop",
        action="append",
        type=non_empty_text,
        metavar="TEXT",
        help="stop before this text; may be given several times",
    )
    sampling.add_argument("--seed", type=int, default=0, help="seed of the random draws (default: %(default)s)")
    parser.add_argument(
        "--precision",
        choices=get_args(WeightsDtype),
        default="fp32",
        help="dtype of weights and products (default: %(default)s)",
    )
    return parser


def _continue(generator: TextGenerator, sample: SampleConfig, prompt: str, seed: int) -> Generator[str]:
    yield prompt
    yield from generator.stream(prompt, sample, seed)


def _ask() -> str:
    is_terminal = sys.stdin.isatty()
    try:
        return input("> " if is_terminal else "")
    except UnicodeDecodeError as error:
        raise UserError(f"standard input is not UTF-8 text: {error.reason} at byte {error.start}") from error
    except (EOFError, KeyboardInterrupt):
        if is_terminal:
            _show("\n")
        raise


def _next(prompts: Iterator[str]) -> str:
    for prompt in prompts:
        return prompt
    raise EOFError


def _show(text: str) -> None:
    print(text, end="", flush=True)


if __name__ == "__main__":
    run_command(main)
