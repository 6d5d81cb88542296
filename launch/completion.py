"""Print a completion script. With it, a shell completes commands, options, files and config keys of gpt2-pipeline."""

import argparse
import pkgutil
from collections.abc import Iterator, Sequence

import shtab

from launch.cli import ArgumentParser, run_command
from data_tools.errors import PROJECT
from launch.__main__ import COMMANDS
from pipeline.config.keys import valid_keys
from pipeline.config.shipped import shipped_configs

SHELLS = ("bash", "fish", "zsh")

#: Metavar of an option -> the values that the shell proposes.
_BY_METAVAR = {
    **dict.fromkeys(("DIR", "FOLDER", "RUN"), shtab.DIRECTORY),
    **dict.fromkeys(("DIR_OR_NAME", "FILE", "PATH", "SOURCE", "SRC"), shtab.FILE),
}

#: Bash adds a space after a completed word. After ``section.key=``, the value must follow without a space.
_BASH_WITHOUT_SPACE_AFTER_KEYS = """
_gpt2_pipeline() {
  _shtab_gpt2_pipeline
  [[ ${COMPREPLY[0]-} != *= ]] || compopt -o nospace
}
complete -o bashdefault -F _gpt2_pipeline gpt2-pipeline"""


def main() -> None:
    print(completion_script(build_parser().parse_args().shell))


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__, example="gpt2-pipeline completion bash > completion.bash")
    parser.add_argument("shell", choices=SHELLS, help="the shell that runs the script")
    return parser


def completion_script(shell: str) -> str:
    """Return a completion script for the given shell, with all commands, options and config keys."""
    root = build_root_parser()
    for action in _actions(root):
        _propose_values(action)
    script: str = shtab.complete(root, shell)
    return script + (_BASH_WITHOUT_SPACE_AFTER_KEYS if shell == "bash" else "")


def build_root_parser() -> ArgumentParser:
    """Return a parser that has the parser of each command as a sub-command."""
    root = ArgumentParser(prog=PROJECT, description="", example="")
    root.add_argument("--version", action="version", help="show the version")
    commands = root.add_subparsers(metavar="COMMAND")
    for name, (module, first_options, description) in COMMANDS.items():
        parser = _follow(pkgutil.resolve_name(f"launch.{module}:build_parser")(), first_options)
        commands.add_parser(
            name, help=description, description=description, example="", parents=[parser], add_help=False
        )
    return root


def _follow(parser: ArgumentParser, arguments: Sequence[str]) -> ArgumentParser:
    """Return the parser of the sub-command that the arguments begin with, or ``parser`` itself."""
    subparsers = {name: subparser for action in parser._actions for name, subparser in _subparsers(action).items()}
    return subparsers.get(arguments[0], parser) if arguments else parser


def _actions(parser: ArgumentParser) -> Iterator[argparse.Action]:
    for action in parser._actions:
        yield action
        for subparser in _subparsers(action).values():
            yield from _actions(subparser)


def _subparsers(action: argparse.Action) -> dict[str, ArgumentParser]:
    return action.choices if isinstance(action, argparse._SubParsersAction) else {}


def _propose_values(action: argparse.Action) -> None:
    if action.dest == "set":
        action.choices = [f"{key}=" for key in _keys_with_values()]
    elif action.dest == "config":
        action.complete = _propose_configs()  # type: ignore[attr-defined]  # an attribute that shtab reads
    elif action.metavar in _BY_METAVAR:
        action.complete = _BY_METAVAR[str(action.metavar)]  # type: ignore[attr-defined]


def _keys_with_values() -> list[str]:
    """Return the keys that are not sections and not elements of lists."""
    keys = [key for key in valid_keys() if "*" not in key]
    sections = {key.rpartition(".")[0] for key in valid_keys()}
    return [key for key in keys if key not in sections]


def _propose_configs() -> dict[str, object]:
    """Return the completion of ``--config`` for each shell."""
    names = " ".join(sorted(shipped_configs()))
    function = "_gpt2_pipeline_config_file"
    bash = f"""
{function}() {{
  compgen -W "{names}" -- "$1"
  compgen -f -X '!*.json' -- "$1"
  compgen -d -- "$1"
}}"""
    zsh = f"""
{function}() {{
  _alternative 'names:shipped config:({names})' 'files:JSON file:_files -g "*.json"'
}}"""
    fish = f"(string split ' ' '{names}'; __fish_complete_suffix .json)"
    return {"bash": function, "zsh": function, "fish": fish, "preamble": {"bash": bash, "zsh": zsh}}


if __name__ == "__main__":
    run_command(main)
