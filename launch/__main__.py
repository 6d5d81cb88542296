"""Run any command of the pipeline: ``gpt2-pipeline COMMAND ...``, or ``python -m launch COMMAND ...``."""

import pkgutil
import sys
from collections.abc import Sequence
from importlib.metadata import version
from typing import NoReturn

from launch.cli import run_command
from data_tools.errors import PROJECT, UserError

#: Command -> (module in ``launch``, options that come first, description).
COMMANDS: dict[str, tuple[str, tuple[str, ...], str]] = {
    "quickstart": ("quickstart", (), "tokenize, train, evaluate and sample a small GPT-2 in a few minutes"),
    "run": ("run", (), "run all stages of one config"),
    "tokenize": ("tokenize_corpus", (), "turn text into token shards"),
    "train": ("train", (), "train a model; with several processes: torchrun -m launch.train ..., see train --help"),
    "ladder": ("ladder", (), "compare several training lengths of one model"),
    "evaluate": ("evaluate", (), "measure a checkpoint on the validation split and on tasks"),
    "harness": ("harness", (), "run tasks of lm-evaluation-harness on a checkpoint"),
    "generate": ("generate", (), "complete prompts"),
    "export": ("export", (), "export to Hugging Face, or import a model"),
    "report": ("report", (), "show runs as an HTML page"),
    "runs": ("runs", (), "list runs: state, step, loss, speed, age, size, last checkpoint"),
    "checkpoint": ("checkpoint", (), "inspect, verify, prune, convert or average checkpoints"),
    "shards": ("shards", (), "inspect, verify or convert token shards"),
    "init": ("config", ("init",), "write a first run config"),
    "config": ("config", (), "show each key of a config with the file that sets it, or explain the keys"),
    "plan": ("plan", (), "estimate the memory, time and cost of a run, without a GPU"),
    "doctor": ("doctor", (), "check this machine"),
    "completion": ("completion", (), "print a script for the Tab key of bash, fish or zsh"),
}


def main() -> NoReturn:
    run_command(lambda: run_subcommand(sys.argv[1:]))


def run_subcommand(arguments: Sequence[str]) -> object:
    """Run the command that the first argument names.

    Raises:
        UserError: the first argument is neither a command nor ``--help`` or ``--version``.
    """
    name = arguments[0] if arguments else "--help"
    if name in ("-h", "--help"):
        print(_help())
        return None
    if name == "--version":
        print(f"{PROJECT} {version(PROJECT)}")
        return None
    if name not in COMMANDS:
        raise UserError(f"{name}: no such command; there are {', '.join(COMMANDS)}")
    module, first_options, _ = COMMANDS[name]
    shown_name = module if first_options else name  # for example, init is config init
    sys.argv = [f"{PROJECT} {shown_name}", *first_options, *arguments[1:]]
    run = pkgutil.resolve_name(f"launch.{module}:main")  # imports only this command
    return run()


def _help() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {description}" for name, (_, _, description) in COMMANDS.items()]
    return "\n".join(
        [
            f"usage: {PROJECT} COMMAND [options]",
            "",
            "Tokenize, train and evaluate GPT-2; the same curve under DDP, FSDP and DeepSpeed ZeRO.",
            "",
            *lines,
            "",
            f"{PROJECT} COMMAND --help shows the options of a command, {PROJECT} --version the version.",
        ]
    )


if __name__ == "__main__":
    main()
